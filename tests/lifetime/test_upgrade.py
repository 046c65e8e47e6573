"""A sandbox whose agent is replaced: commands run on, clients come back, and the idle clock does not begin again."""

import time

import pytest
from e2b import Sandbox

IDLE = 12


def upgrade(hostd, sandbox: Sandbox) -> dict:
    answer = hostd.request("POST", f"/sandboxes/{sandbox.sandbox_id}/upgrade")
    assert answer.status_code == 200, answer.text
    return answer.json()


def work_across_an_upgrade(hostd) -> None:
    sandbox = Sandbox.create(metadata={"idle_timeout": str(IDLE)}, **hostd.sdk())
    sandbox.files.write("/tmp/before", "kept")
    job = sandbox.commands.run("for n in 1 2 3 4; do sleep 1; echo $n >> /tmp/counted; done; exit 7", background=True)
    ended = sandbox.commands.run("sleep 3; exit 5", background=True)
    ended.disconnect()
    upgraded = upgrade(hostd, sandbox)
    assert upgraded["handover"]["failed"] is False
    assert upgraded["handover"]["procs"] == 2
    # What broke is the stream alone; the SDK comes back to the same process.
    back = sandbox.commands.connect(job.pid)
    with pytest.raises(Exception, match="code 7"):
        back.wait()
    assert sandbox.files.read("/tmp/counted").split() == ["1", "2", "3", "4"]
    assert sandbox.files.read("/tmp/before") == "kept"
    last = time.monotonic()
    time.sleep(4)
    assert upgrade(hostd, sandbox)["handover"]["procs"] == 0
    at, tombstone = hostd.wait_until_ended(sandbox.sandbox_id, within=IDLE + 15)
    assert tombstone["reason"] == "idle"
    assert IDLE - 0.1 <= at - last <= IDLE + 1, f"released after {at - last:.3f} s: {tombstone}"


@pytest.mark.takes(20)
def test_a_container_goes_on_when_its_agent_is_replaced(hostd):
    work_across_an_upgrade(hostd("container", idle_floor=5))


@pytest.mark.vms(1)
@pytest.mark.takes(30)
@pytest.mark.parametrize("link", ["vsock", "serial"])
def test_a_microvm_goes_on_when_its_agent_is_replaced(hostd, link):
    work_across_an_upgrade(hostd("qemu", link=link, idle_floor=5))
