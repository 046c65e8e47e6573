"""hostd dies without a word: nothing that it promised is lost."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from e2b import Sandbox

from harness import processes


def create(hostd, **options) -> Sandbox:
    sandbox = Sandbox.create(**options, **hostd.sdk())
    sandbox.files.write("/tmp/mark", sandbox.sandbox_id)
    return sandbox


def started_at(hostd, sandbox: Sandbox) -> float:
    return datetime.fromisoformat(hostd.info(sandbox.sandbox_id)["startedAt"]).timestamp()


def assert_three_are_adopted_and_end_when_due(hostd, runtime: str) -> None:
    supervisor = hostd(runtime, idle_floor=5)
    with ThreadPoolExecutor(3) as pool:
        idle = pool.submit(create, supervisor, metadata={"idle_timeout": "20"})
        timed = pool.submit(create, supervisor, timeout=60)
        kept = pool.submit(create, supervisor, timeout=600)
        idle, timed, kept = idle.result(), timed.result(), kept.result()
    before = {each.sandbox_id: supervisor.info(each.sandbox_id) for each in (idle, timed, kept)}
    started = started_at(supervisor, timed)

    supervisor.kill9()
    time.sleep(1)
    supervisor.restart()

    assert set(supervisor.sandboxes()) == set(before)
    for sandbox in (idle, timed, kept):
        after = supervisor.info(sandbox.sandbox_id)
        for name in ("metadata", "templateID", "envdVersion"):
            assert after[name] == before[sandbox.sandbox_id][name], name
        for name in ("startedAt", "endAt"):
            moved = datetime.fromisoformat(after[name]) - datetime.fromisoformat(before[sandbox.sandbox_id][name])
            assert abs(moved.total_seconds()) < 0.1, name
        assert sandbox.is_running() is True
        assert sandbox.commands.run("cat /tmp/mark; id -un").stdout == f"{sandbox.sandbox_id}user\n"
        if sandbox is idle:
            last = time.time()

    _, ended = supervisor.wait_until_ended(idle.sandbox_id, within=40)
    assert ended["reason"] == "idle"
    after = datetime.fromisoformat(ended["at"]).timestamp() - last
    assert 20 - 0.1 <= after <= 21, f"released {after:.3f} s after its last use"
    assert ended["idle_for_s"] >= 20
    assert idle.is_running() is False

    _, ended = supervisor.wait_until_ended(timed.sandbox_id, within=80)
    assert ended["reason"] == "timeout"
    assert 60 <= time.time() - started <= 61.1

    joined = Sandbox.connect(kept.sandbox_id, **supervisor.sdk())
    assert joined.commands.run("cat /tmp/mark").stdout == kept.sandbox_id
    assert kept.kill() is True
    assert supervisor.sandboxes() == []


@pytest.mark.vms(3)
@pytest.mark.takes(85)
def test_after_a_restart_three_machines_are_adopted_and_end_when_due(hostd):
    assert_three_are_adopted_and_end_when_due(hostd, "qemu")


@pytest.mark.takes(65)
def test_after_a_restart_three_containers_are_adopted_and_end_when_due(hostd):
    assert_three_are_adopted_and_end_when_due(hostd, "container")


def assert_gone_at_the_maximum_lifetime(hostd, runtime: str, lifetime: int) -> None:
    supervisor = hostd(runtime, max_lifetime=lifetime, idle_floor=5)
    with ThreadPoolExecutor(3) as pool:
        sandboxes = list(pool.map(lambda _: create(supervisor, timeout=lifetime), range(3)))
    due = max(started_at(supervisor, each) for each in sandboxes) + lifetime
    guards = supervisor.guards()
    assert guards.keys() == {each.sandbox_id for each in sandboxes}, "each has a guard outside hostd"

    supervisor.kill9()

    time.sleep(1)
    for sandbox_id, pid in guards.items():
        assert processes.alive(pid), f"the guard of {sandbox_id} went with hostd"

    processes.wait_until(
        lambda: not processes.belonging_to(supervisor.data),
        within=max(0, due + 1.5 - time.time()),
        what="all are gone when due",
    )
    assert not [pid for pid in guards.values() if processes.alive(pid)]


@pytest.mark.vms(3)
@pytest.mark.takes(55)
def test_without_a_restart_machines_are_gone_at_their_maximum_lifetime(hostd):
    assert_gone_at_the_maximum_lifetime(hostd, "qemu", lifetime=40)


@pytest.mark.takes(20)
def test_without_a_restart_containers_are_gone_at_their_maximum_lifetime(hostd):
    assert_gone_at_the_maximum_lifetime(hostd, "container", lifetime=15)


@pytest.mark.takes(15)
def test_what_fell_due_while_nobody_watched_is_ended_at_the_restart(hostd):
    supervisor = hostd()
    overdue = create(supervisor, timeout=5)
    fine = create(supervisor, timeout=300)
    supervisor.kill9()
    time.sleep(7)

    supervisor.restart()

    _, ended = supervisor.wait_until_ended(overdue.sandbox_id, within=3)
    assert ended["reason"] == "timeout"
    assert supervisor.sandboxes() == [fine.sandbox_id]
    assert overdue.is_running() is False


def test_a_tombstone_survives_a_restart(hostd):
    supervisor = hostd()
    sandbox = create(supervisor)
    sandbox.kill()
    before = supervisor.tombstone(sandbox.sandbox_id)
    supervisor.kill9()

    supervisor.restart()

    assert supervisor.tombstone(sandbox.sandbox_id) == before
    assert sandbox.is_running() is False


@pytest.mark.takes(20)
def test_hostd_killed_again_and_again_while_creating_leaves_nothing_behind(hostd):
    """Whatever stage a create was in, the restarted hostd owns it or has cleaned it up."""
    supervisor = hostd()
    for pause in (0.02, 0.1, 0.2, 0.4):
        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(supervisor.request, "POST", "/v2/sandboxes", json={"templateID": "base", "timeout": 60})
            time.sleep(pause)
            supervisor.kill9()
        supervisor.restart()
        for sandbox_id in supervisor.sandboxes():
            joined = Sandbox.connect(sandbox_id, **supervisor.sdk())
            assert joined.commands.run("echo adopted").stdout == "adopted\n"
    supervisor.end_sandboxes()
    assert supervisor.sandboxes() == []
    processes.wait_until(lambda: not supervisor.guards(), within=10, what="no guard is left")


@pytest.mark.vms(1)
@pytest.mark.takes(20)
def test_a_machine_that_crashes_is_over_and_says_so(hostd):
    supervisor = hostd("qemu")
    sandbox = create(supervisor)
    [pid] = [pid for pid, command in processes.belonging_to(supervisor.data).items() if is_qemu(command)]
    command = sandbox.commands.run("sleep 100", background=True, timeout=0)

    processes.end(pid)

    _, ended = supervisor.wait_until_ended(sandbox.sandbox_id, within=5)
    assert ended["reason"] == "crashed"
    assert sandbox.is_running() is False
    with pytest.raises(Exception, match="(?i)killed|not found|end of life"):
        command.wait()


def is_qemu(command: str) -> bool:
    return "qemu-system" in command.split()[0]
