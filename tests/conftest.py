"""Fixtures: hostd with containers, hostd with microVMs, guestd alone, and sandboxes through the E2B SDK."""

import fcntl
import os

import pytest

from harness import locations
from harness.guestd import Guestd
from harness.hostd import Hostd
from harness.vm_slots import FOLDER, VmSlots

# What a failed test shows: the processes that were alive in it, each with a `stderr()`.
_running: list = []


@pytest.fixture(scope="session")
def running():
    """For fixtures elsewhere that start processes: what is in this list is shown when a test fails."""
    return _running


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: the text that `make` returned in the first of the test processes to come here."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base

    def text(name: str, make) -> str:
        kept = shared / f"{name}.once"
        with open(kept.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                kept.write_text(make())
        return kept.read_text()

    return text


def _require(runtime: str) -> None:
    {"qemu": locations.require_qemu, "container": locations.require_runc}[runtime]()


@pytest.fixture(autouse=True)
def vm_room(request):
    """A test marked `vms(n)` waits for its turn to boot n microVMs."""
    marker = request.node.get_closest_marker("vms")
    if marker is None:
        yield
        return
    locations.require_qemu()
    with VmSlots(FOLDER).take(marker.args[0]):
        yield


@pytest.fixture
def hostd(vm_room):
    """Starts a hostd of the test's own: `hostd("qemu", max_lifetime=40)`."""
    started = []

    def start(runtime: str = "container", **options) -> Hostd:
        _require(runtime)
        supervisor = Hostd(runtime, **options)
        started.append(supervisor)
        _running.append(supervisor)
        return supervisor.start()

    yield start
    for supervisor in reversed(started):
        _running.remove(supervisor)
        supervisor.close()


def _shared(runtime: str, **options):
    _require(runtime)
    supervisor = Hostd(runtime, **options)
    _running.append(supervisor)
    try:
        yield supervisor.start()
    finally:
        _running.remove(supervisor)
        supervisor.close()


@pytest.fixture(scope="session")
def _containers():
    yield from _shared("container", tls_listen="127.0.0.1:0")


@pytest.fixture(scope="session")
def _machines():
    yield from _shared("qemu")


@pytest.fixture
def containers(_containers):
    """hostd as shipped, with containers, over TLS as well; one per test process, empty at the start of each test."""
    yield _containers
    _containers.end_sandboxes()


@pytest.fixture
def machines(vm_room, _machines):
    """hostd as shipped, with microVMs; one per test process, empty at the start of each test."""
    yield _machines
    _machines.end_sandboxes()


@pytest.fixture
def sandbox(containers):
    """A container sandbox through the E2B SDK."""
    from e2b import Sandbox

    return Sandbox.create(**containers.sdk())


@pytest.fixture
def raw(containers):
    """A container sandbox and a client of it, as bytes: `(created, client)`."""
    created = containers.create()
    with containers.plane(created) as client:
        yield created, client


@pytest.fixture
def guestd():
    """guestd alone, uninitialised; needs root, as the agent has it in a machine."""
    if os.geteuid() != 0:
        pytest.skip("the agent was not tested alone: it needs root to run commands as other users")
    agent = Guestd()
    _running.append(agent)
    yield agent.start()
    _running.remove(agent)
    agent.close()


@pytest.fixture
def agent(guestd):
    """A client of guestd alone."""
    with guestd.client() as client:
        yield client


def pytest_collection_modifyitems(items):
    """The longest first, so that no long sleep starts when everything else is done."""

    def seconds(item) -> float:
        marker = item.get_closest_marker("takes")
        return -marker.args[0] if marker else 0

    items.sort(key=seconds)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for process in _running:
            report.sections.append((f"stderr of {type(process).__name__}", process.stderr()[-20_000:]))
    return report
