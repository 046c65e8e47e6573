"""hostd is stopped as a service manager does it."""

import pytest
from e2b import Sandbox

from harness import processes


def test_sigterm_ends_every_sandbox_and_leaves_no_process(hostd):
    supervisor = hostd()
    sandboxes = [Sandbox.create(**supervisor.sdk()) for _ in range(3)]
    guards = supervisor.guards()

    assert supervisor.terminate() == 0

    assert not [pid for pid in guards.values() if processes.alive(pid)]
    assert supervisor.leftovers() == []
    supervisor.restart()
    assert supervisor.sandboxes() == []
    assert [supervisor.tombstone(each.sandbox_id)["reason"] for each in sandboxes] == 3 * ["host_shutdown"]


def test_with_on_exit_keep_sandboxes_outlive_hostd(hostd):
    supervisor = hostd(on_exit="keep")
    sandbox = Sandbox.create(timeout=60, **supervisor.sdk())
    sandbox.files.write("/tmp/mark", "x")

    assert supervisor.terminate() == 0
    supervisor.restart()

    assert sandbox.files.read("/tmp/mark") == "x"
    assert sandbox.kill() is True


@pytest.mark.vms(1)
@pytest.mark.takes(15)
def test_sigterm_ends_machines_too(hostd):
    supervisor = hostd("qemu")
    Sandbox.create(**supervisor.sdk())

    assert supervisor.terminate() == 0

    assert supervisor.leftovers() == []
