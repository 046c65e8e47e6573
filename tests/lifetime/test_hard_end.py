"""Nothing outlives its timeout or the maximum lifetime by more than a second, whatever happens inside."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from e2b import Sandbox, TimeoutException

# The create answer's own way to this process.
ON_ITS_WAY = 0.5


def started_at(machines, sandbox_id: str) -> float:
    return datetime.fromisoformat(machines.info(sandbox_id)["startedAt"]).timestamp()


def assert_lived(machines, sandbox_id: str, seconds: float, reasons: set, created: float, started: float) -> None:
    at, ended = machines.wait_until_ended(sandbox_id, within=seconds + 15)
    lived = time.time() - started
    assert ended["reason"] in reasons
    assert seconds - ON_ITS_WAY <= at - created <= seconds + 1, f"ended {at - created:.3f} s after create answered"
    assert seconds <= lived <= seconds + 1.1, f"ended {lived:.3f} s after its startedAt"
    assert seconds <= ended["lived_s"] <= seconds + 1


@pytest.mark.vms(1)
@pytest.mark.takes(30)
def test_without_an_idle_timeout_the_timeout_ends_it(machines):
    sandbox = Sandbox.create(timeout=20, **machines.sdk())
    created = time.monotonic()
    started = started_at(machines, sandbox.sandbox_id)

    assert_lived(machines, sandbox.sandbox_id, 20, {"timeout"}, created, started)
    assert sandbox.is_running() is False
    assert sandbox.kill() is False


@pytest.mark.vms(3)
@pytest.mark.takes(55)
def test_nothing_lives_past_the_maximum_lifetime(hostd):
    """Three that would like to: by timeout, by a later setTimeout, and by being busy all the time."""
    machines = hostd("qemu", max_lifetime=40, idle_floor=5)

    def live(prepare, reasons: set, **options) -> None:
        sandbox = Sandbox.create(**options, **machines.sdk())
        created = time.monotonic()
        started = started_at(machines, sandbox.sandbox_id)
        prepare(sandbox)
        assert_lived(machines, sandbox.sandbox_id, 40, reasons, created, started)

    def stay_busy(sandbox: Sandbox) -> None:
        busy.append(clients.submit(sandbox.commands.run, "while :; do echo busy; sleep 1; done", timeout=0))

    busy = []
    with ThreadPoolExecutor(2) as clients, ThreadPoolExecutor(3) as pool:
        lives = [
            pool.submit(live, lambda sandbox: None, {"timeout", "lifetime"}, timeout=40),
            pool.submit(live, lambda sandbox: sandbox.set_timeout(3600), {"lifetime"}, timeout=30),
            pool.submit(live, stay_busy, {"lifetime"}, metadata={"idle_timeout": "10"}),
        ]
        for life in lives:
            life.result()
        # The client of the busy one is told, at once and by type.
        with pytest.raises(TimeoutException):
            busy[0].result(timeout=10)


@pytest.mark.vms(1)
@pytest.mark.takes(25)
def test_a_shortened_timeout_ends_the_machine_then(machines):
    sandbox = Sandbox.create(timeout=300, **machines.sdk())
    sandbox.commands.run("true")
    asked = time.monotonic()
    sandbox.set_timeout(8)
    answered = time.monotonic()

    at, ended = machines.wait_until_ended(sandbox.sandbox_id, within=20)

    assert at - answered <= 9 and at - asked >= 8
    assert ended["reason"] == "timeout"


@pytest.mark.vms(1)
@pytest.mark.takes(20)
def test_kill_ends_the_machine_at_once_and_says_so(machines):
    sandbox = Sandbox.create(metadata={"idle_timeout": "60"}, **machines.sdk())

    assert sandbox.kill() is True

    assert sandbox.is_running() is False
    assert sandbox.kill() is False
    assert machines.tombstone(sandbox.sandbox_id)["reason"] == "killed"
