"""Each way of reaching the agent in a microVM carries commands, files, many streams at once and the release."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2b import Sandbox

from harness import locations


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


# While `deaf` is there, its machine's device leads to sockets that nobody listens on. hostd runs no scripts: it executes what it opened.
DEAF = """
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **words) {{
    static char elsewhere[4096];
    if (count == 3 && access("{folder}/deaf", F_OK) == 0) {{
        snprintf(elsewhere, sizeof elsewhere, "%.*suds-path=elsewhere", (int)(strstr(words[2], "uds-path=") - words[2]), words[2]);
        words[2] = elsewhere;
    }}
    return execv("{device}", words);
}}
"""


@pytest.fixture
def deaf_at_first():
    """A device program whose first machine hears and says nothing."""
    # The user of a machine has to reach it.
    folder = Path(tempfile.mkdtemp(prefix="device-", dir="/tmp"))
    folder.chmod(0o755)
    program, deaf = folder / "program", folder / "deaf"
    source = DEAF.format(folder=folder, device=locations.vhost_device_vsock())
    # Rust does not build without a C compiler, either.
    subprocess.run(["cc", "-x", "c", "-o", str(program), "-"], input=source, text=True, check=True, timeout=60)
    deaf.touch()
    # It begins at once, and the next one after half of the time that a boot may take.
    change = threading.Timer(10, deaf.unlink)
    change.start()
    yield program
    change.cancel()
    shutil.rmtree(folder)


@pytest.mark.vms(1)
@pytest.mark.takes(40)
def test_a_machine_whose_link_carries_nothing_is_booted_again(hostd, deaf_at_first):
    """It happens to some: the client must not be told after a minute that it had bad luck."""
    machines = hostd("qemu", link="vsock", vhost_device_vsock=deaf_at_first)
    sandbox = Sandbox.create(timeout=60, **machines.sdk())
    assert sandbox.commands.run("echo heard").stdout == "heard\n"
    assert "did not say that it listens" in machines.stderr() and "another machine is booted" in machines.stderr()
    assert sandbox.kill() is True
