"""A sandbox that nobody uses is released no earlier than its idle timeout and no later than a second after it, in microVMs.

They sleep at the same time, in one hostd; each is a subtest.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import Sandbox

from harness.together import all_at_once
from harness.vm_slots import two_boots

IDLE = 60


def create(machines, **options) -> Sandbox:
    with two_boots:
        return Sandbox.create(metadata={"idle_timeout": str(IDLE)}, **options, **machines.sdk())


def assert_released_on_time(machines, sandbox: Sandbox, used: float, last: float) -> None:
    """The last use ended between `used` and `last`, when its answer was here, on the monotonic clock."""
    at, ended = machines.wait_until_ended(sandbox.sandbox_id, within=IDLE + 15)
    assert ended["reason"] == "idle"
    assert at - used >= IDLE and at - last <= IDLE + 1, f"released {at - used:.3f} to {at - last:.3f} s after its last use: {ended}"
    assert IDLE <= ended["idle_for_s"] <= IDLE + 1


def one_command_then_silence(machines) -> None:
    sandbox = create(machines)
    used = time.monotonic()
    sandbox.commands.run("ls -al")
    assert_released_on_time(machines, sandbox, used, last=time.monotonic())
    assert sandbox.is_running() is False


def three_idle_machines_in_parallel_are_each_released_on_time(machines):
    with ThreadPoolExecutor(3) as pool:
        for run in [pool.submit(one_command_then_silence, machines) for _ in range(3)]:
            run.result()


def an_idle_machine_is_released_on_time(machines):
    one_command_then_silence(machines)


def another_idle_machine_is_released_on_time(machines):
    one_command_then_silence(machines)


def asking_whether_it_runs_does_not_keep_it_alive(machines):
    """`is_running` every 5 s, and the control plane's get and list with it."""
    sandbox = create(machines)
    used = time.monotonic()
    sandbox.commands.run("true")
    last = time.monotonic()
    released = threading.Event()

    def poll() -> list[bool]:
        answers = []
        while not released.wait(5):
            answers.append(sandbox.is_running())
            machines.request("GET", f"/sandboxes/{sandbox.sandbox_id}")
            machines.request("GET", "/v2/sandboxes")
        return answers

    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(poll)
        try:
            assert_released_on_time(machines, sandbox, used, last)
        finally:
            released.set()
        answers = polling.result()
    assert answers.count(True) >= 5, "the polls themselves did not work"
    assert sandbox.is_running() is False


def a_command_of_70_seconds_with_its_client_attached_is_not_released_while_it_runs(machines):
    sandbox = create(machines)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: (sandbox.commands.run("sleep 70; echo done", timeout=0), time.monotonic()))
        time.sleep(65)
        told = machines.explain(sandbox.sandbox_id)
        assert told["state"] == "running"
        assert any(hold["counts"] for hold in told["holds"]), f"nothing explains why it lives: {told}"
        result, last = running.result()
    assert result.stdout == "done\n"
    assert_released_on_time(machines, sandbox, began + 70, last)


def a_command_whose_client_went_does_not_hold_the_machine(machines):
    sandbox = create(machines)
    command = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    used = time.monotonic()
    command.disconnect()
    assert_released_on_time(machines, sandbox, used, last=time.monotonic())


def a_machine_that_was_never_used_is_released_too(machines):
    used = time.monotonic()
    sandbox = create(machines)
    assert_released_on_time(machines, sandbox, used, last=time.monotonic())


RELEASES = [
    three_idle_machines_in_parallel_are_each_released_on_time,
    an_idle_machine_is_released_on_time,
    another_idle_machine_is_released_on_time,
    asking_whether_it_runs_does_not_keep_it_alive,
    a_command_of_70_seconds_with_its_client_attached_is_not_released_while_it_runs,
    a_command_whose_client_went_does_not_hold_the_machine,
    a_machine_that_was_never_used_is_released_too,
]


@pytest.mark.takes(170)
def test_idle_machines_are_released_on_time(machines, subtests):
    all_at_once(subtests, RELEASES, machines)
