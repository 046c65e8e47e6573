"""Fixtures: the planes on which each case runs, and the map from the contract to the cases."""

import json
import os
from pathlib import Path

import pytest

from harness import locations
from harness.guestd import Guestd
from harness.hostd import Hostd
from harness.planes import Accounts, Plane, alone, in_a_machine
from harness.vm_slots import VmSlots


def pytest_addoption(parser):
    parser.addoption(
        "--contract-map",
        choices=("text", "json"),
        nargs="?",
        const="text",
        help="list the contract's rows with their cases; run nothing",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.getoption("--contract-map", None):
        # The map is made by the process that collects, so there must be only this one.
        config.option.numprocesses = 0
        config.option.dist = "no"
        config.option.tx = []


def pytest_generate_tests(metafunc):
    """A case runs against guestd alone, and one marked `through_hostd` also, or only, in a microVM."""
    if "plane" in metafunc.fixturenames:
        through = metafunc.definition.get_closest_marker("through_hostd")
        # `only`: what would harm the machine under the tests, were the agent wrong.
        planes = [] if through and through.kwargs.get("only") else ["alone"]
        if through:
            planes.append(pytest.param("microvm", marks=pytest.mark.takes(0.5)))
        metafunc.parametrize("plane", planes, indirect=True)


def pytest_collection_finish(session):
    wanted = session.config.getoption("--contract-map", None)
    if wanted and not hasattr(session.config, "workerinput"):
        from contract_map import cases_by_row, count, render

        found = cases_by_row(session.items)
        cases, machines = count(session.items)
        if wanted == "json":
            print("\n" + json.dumps({"cases": cases, "through_hostd": machines, "rows": found}))
        else:
            print(f"\n{render(found)}\n{cases} cases, {machines} of them through hostd as well")
        pytest.exit("the contract map was asked for", returncode=0)


@pytest.fixture(scope="session")
def accounts():
    if os.geteuid() != 0:
        pytest.skip("the agent was not tested alone: it needs root to run commands as other users")
    made = Accounts()
    made.require()
    yield made
    made.close()


@pytest.fixture(scope="session")
def _alone(accounts, running):
    agent, plane = alone(accounts)
    running.append(agent)
    yield plane
    plane.close()
    running.remove(agent)
    agent.close()


class _Machine:
    """One microVM for all cases of this test process, booted for the first of them."""

    def __init__(self, running):
        self.running = running
        self.hostd = None
        self.plane = None

    def get(self) -> Plane:
        if self.plane is None:
            self.hostd = Hostd("qemu")
            self.running.append(self.hostd)
            self.hostd.start()
            self.plane = in_a_machine(self.hostd)
        return self.plane

    def close(self):
        if self.plane:
            self.plane.close()
        if self.hostd:
            self.running.remove(self.hostd)
            self.hostd.close()


@pytest.fixture(scope="session")
def _machine(running):
    machine = _Machine(running)
    yield machine
    machine.close()


@pytest.fixture
def plane(request):
    """The agent under test, initialised as for an SDK in debug mode (alone) or by hostd."""
    if request.param == "alone":
        yield request.getfixturevalue("_alone")
        return
    locations.require_qemu()
    # The machine outlives the case, its turn does not: it is idle in between, and a process that waits for another turn holds none.
    with VmSlots(Path("/tmp/guestd-vm-slots")).take(1):
        yield request.getfixturevalue("_machine").get()


@pytest.fixture
def box(plane):
    """An empty folder of `user` on the plane."""
    return plane.folder()


@pytest.fixture
def fresh(accounts, running):
    """guestd alone that nobody has initialised yet: for cases about tokens, environments and defaults."""
    agent = Guestd(wrapper=accounts.wrapper).start()
    running.append(agent)
    made = Plane("alone", agent.url, guestd=agent)
    yield made
    made.close()
    running.remove(agent)
    agent.close()
