"""Each way of reaching the agent in a microVM carries commands, files, many streams at once and the release."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import Sandbox


@pytest.mark.vms(1)
@pytest.mark.takes(30)
@pytest.mark.parametrize("link", ["vsock", "serial"])
def test_a_link_carries_everything(hostd, link):
    machines = hostd("qemu", link=link, idle_floor=5)
    sandbox = Sandbox.create(metadata={"idle_timeout": "5"}, **machines.sdk())

    data = os.urandom(4 << 20)
    sandbox.files.write("/tmp/data", data, use_octet_stream=True)
    assert sandbox.commands.run("sha256sum /tmp/data").stdout.split()[0] == hashlib.sha256(data).hexdigest()
    assert bytes(sandbox.files.read("/tmp/data", format="bytes")) == data

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda n: sandbox.commands.run(f"echo {n}").stdout, range(20)))
    assert answers == [f"{n}\n" for n in range(20)]

    last = time.monotonic()
    at, ended = machines.wait_until_ended(sandbox.sandbox_id, within=15)
    assert ended["reason"] == "idle"
    assert 5 - 0.1 <= at - last <= 6
    assert sandbox.is_running() is False


@pytest.mark.vms(5)
@pytest.mark.takes(35)
@pytest.mark.parametrize("link", ["vsock", "serial"])
def test_machines_that_boot_at_once_all_come_up(hostd, link):
    """A link that is dialled while the guest still boots must not be stuck afterwards."""
    machines = hostd("qemu", link=link)

    def boot_and_kill(_) -> None:
        sandbox = Sandbox.create(timeout=60, **machines.sdk())
        assert sandbox.kill() is True

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(boot_and_kill, range(15)))
