"""Requests fired into every window of the two-phase release.

The release pauses in each of its windows (`HOSTD_RELEASE_PAUSE_MS`): before it asks the guest, between the guest's "ready" and the
decision, and between the decision and the stop. Whatever arrives is answered in full by a live sandbox or with the typed "sandbox was not
found"; nothing hangs, nothing is cut, nothing is accepted and then lost.
"""

import hashlib
import itertools
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import Sandbox, SandboxNotRunningException

from harness import connect

IDLE = 1.0
DEADLINE = 20
CONTENT = os.urandom(256 << 10)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class RawClient:
    """HTTP as bytes: the whole answer, or the proxy's JSON."""

    def __init__(self, hostd):
        self.created = hostd.create(metadata={"idle_timeout": str(int(IDLE))})
        self.sandbox_id = self.created["sandboxID"]
        self.plane = hostd.plane(self.created)
        self.client = self.plane.__enter__()

    def close(self) -> None:
        self.plane.__exit__(None, None, None)

    def is_gone(self, answer) -> bool:
        if answer.status_code == 200:
            return False
        told = {"sandboxId": self.sandbox_id, "message": "The sandbox was not found", "code": 502}
        assert answer.status_code == 502 and answer.json() | told == answer.json(), f"{answer.status_code}: {answer.text}"
        return True

    def run(self) -> bool:
        request = {"process": connect.process("/bin/sh", "-c", "cat /tmp/content | sha256sum; exit 7")}
        with connect.open_stream(self.client, "process.Process/Start", request) as response:
            if response.status_code != 200:
                response.read()
                return not self.is_gone(response)
            ran = connect.Stream(response).rest()
        assert ran.error is None, ran.error
        assert (ran.stdout.split()[0].decode(), ran.exit_code) == (DIGEST, 7)
        return True

    def write(self) -> bool:
        answer = self.client.post(
            "/files",
            params={"path": "/tmp/content"},
            content=CONTENT,
            headers={"Content-Type": "application/octet-stream"},
        )
        if self.is_gone(answer):
            return False
        assert answer.json()[0]["path"] == "/tmp/content"
        return True

    def read(self) -> bool:
        answer = self.client.get("/files", params={"path": "/tmp/content"})
        if self.is_gone(answer):
            return False
        assert hashlib.sha256(answer.content).hexdigest() == DIGEST
        return True


class SdkClient:
    """The E2B SDK: the result, or its typed exception."""

    def __init__(self, hostd):
        self.sandbox = Sandbox.create(metadata={"idle_timeout": str(int(IDLE))}, **hostd.sdk())
        self.sandbox_id = self.sandbox.sandbox_id

    def close(self) -> None:
        pass

    def answered(self, call) -> bool:
        try:
            call()
        except SandboxNotRunningException as gone:
            assert "was not found" in str(gone)
            return False
        return True

    def run(self) -> bool:
        def call():
            assert self.sandbox.commands.run("cat /tmp/content | sha256sum").stdout.split()[0] == DIGEST

        return self.answered(call)

    def write(self) -> bool:
        return self.answered(lambda: self.sandbox.files.write("/tmp/content", CONTENT))

    def read(self) -> bool:
        def call():
            assert hashlib.sha256(self.sandbox.files.read("/tmp/content", format="bytes")).hexdigest() == DIGEST

        return self.answered(call)


def fire(hostd, client_kind, tries) -> list[tuple[float, str, str]]:
    """One client, a new sandbox whenever its last one was released: (offset, kind, outcome) of each try."""
    outcomes = []
    client = None
    for kind, offset in tries:
        while client is None:
            client = client_kind(hostd)
            if not client.write():
                # This process had no processor for longer than the sandbox's idle timeout.
                client = let_go(hostd, client)
            last = time.monotonic()
        time.sleep(max(0.0, last + IDLE + offset - time.monotonic()))
        fired = time.monotonic()
        answered = getattr(client, kind)()
        last = time.monotonic()
        assert last - fired < DEADLINE, f"{kind} at {offset * 1000:+.0f} ms took {last - fired:.1f} s"
        outcomes.append((offset, kind, "answered" if answered else "not found"))
        if not answered:
            client = let_go(hostd, client)
    return outcomes


def let_go(hostd, client) -> None:
    """Of a sandbox that says that it was released: it must have been, and rightly."""
    _, ended = hostd.wait_until_ended(client.sandbox_id, within=5)
    assert ended["reason"] == "idle"
    assert ended["idle_for_s"] >= IDLE, f"released though it had just answered: {ended}"
    client.close()


def race(hostd, tries: int, clients: int, sweep: tuple[float, float]) -> Counter:
    """Requests at offsets from `sweep`, in seconds from the moment at which the sandbox has been idle long enough."""
    begin, end = sweep
    offsets = [begin + (end - begin) * n / (tries - 1) for n in range(tries)]
    shots = list(zip(itertools.cycle(["run", "write", "read"]), offsets))
    kinds = itertools.cycle([RawClient, SdkClient])
    with ThreadPoolExecutor(clients) as pool:
        firing = [pool.submit(fire, hostd, next(kinds), shots[n::clients]) for n in range(clients)]
        outcomes = [outcome for each in firing for outcome in each.result()]

    counted = Counter((kind, outcome) for _, kind, outcome in outcomes)
    print(f"{len(outcomes)} tries: {dict(counted)}")
    assert len(outcomes) == tries
    assert {outcome for _, outcome in counted} == {"answered", "not found"}, f"the sweep missed the release: {counted}"
    return counted


@pytest.mark.takes(60)
def test_240_requests_race_the_release_of_containers(hostd):
    containers = hostd(idle_floor=1, environment={"HOSTD_RELEASE_PAUSE_MS": "30"})
    counted = race(containers, tries=240, clients=12, sweep=(-0.150, 0.250))
    for kind in ("run", "write", "read"):
        assert counted[kind, "answered"] and counted[kind, "not found"], f"{kind} never saw both: {counted}"


MACHINES = [
    pytest.param(30, marks=pytest.mark.takes(90)),
    # More machines than the suite has time to boot: with `-m soak`.
    pytest.param(100, marks=[pytest.mark.soak, pytest.mark.takes(300), pytest.mark.timeout(1500)]),
]


@pytest.mark.vms(3)
@pytest.mark.parametrize("tries", MACHINES)
def test_requests_race_the_release_of_machines(hostd, tries):
    """A wider sweep: under emulation the guest's part of the release takes longer."""
    machines = hostd("qemu", idle_floor=1, environment={"HOSTD_RELEASE_PAUSE_MS": "30"})
    race(machines, tries=tries, clients=3, sweep=(-0.150, 0.600))
