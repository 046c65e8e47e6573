"""What an operator meets when something is missing, taken or broken: one clear sentence, an exit code, and nothing lost."""

import os
import re
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2b import Sandbox

from harness import locations, processes
from harness.hostd import API_KEY, Hostd, HostdExited


def refusal(start) -> str:
    """hostd must end by itself, with a code, and say why in a sentence and not in a trace."""
    with pytest.raises(HostdExited) as ended:
        start()
    assert ended.value.code > 0
    said = ended.value.stderr
    assert said.strip(), "it said nothing"
    assert "panicked" not in said and "backtrace" not in said, said
    return said.strip().splitlines()[-1]


def test_a_second_hostd_on_the_same_data_is_refused_and_the_first_unharmed(hostd):
    first = hostd()
    sandbox = Sandbox.create(**first.sdk())

    assert str(first.data) in refusal(lambda: hostd(data=Path(first.data)))

    assert sandbox.commands.run("echo unharmed").stdout == "unharmed\n"


@pytest.mark.parametrize("listener", ["api", "proxy"])
def test_a_port_in_use_is_named(hostd, listener, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def command(self, original=Hostd.command) -> list[str]:
            words = original(self)
            words[words.index(f"--{listener}") + 1] = f"127.0.0.1:{port}"
            return words

        monkeypatch.setattr(Hostd, "command", command)
        assert str(port) in refusal(hostd)


def test_a_missing_qemu_is_named(hostd):
    assert "/nonexistent/qemu" in refusal(lambda: hostd("qemu", qemu="/nonexistent/qemu"))


def test_a_missing_runc_is_named(hostd):
    assert "/nonexistent/runc" in refusal(lambda: hostd("container", runc="/nonexistent/runc"))


def test_a_missing_images_folder_is_named_at_the_start_or_at_create(hostd):
    try:
        supervisor = hostd(images="/nonexistent/images")
    except HostdExited as ended:
        assert ended.code > 0
        assert "/nonexistent/images" in ended.stderr
        return
    answer = supervisor.request("POST", "/v2/sandboxes", json={"templateID": "base"})
    assert 400 <= answer.status_code < 600
    assert "base" in answer.json()["message"]
    assert "/nonexistent/images" in supervisor.stderr() + answer.json()["message"]


@pytest.mark.vms(1)
@pytest.mark.takes(20)
def test_an_unusable_kvm_is_a_refusal_and_not_a_hang(hostd):
    """A /dev/kvm that opens may still be unable to run a guest."""
    try:
        machines = hostd("qemu", accel="kvm")
    except HostdExited as ended:
        assert ended.code > 0
        assert re.search("(?i)kvm", ended.stderr)
        assert "panicked" not in ended.stderr
        return
    answer = machines.request("POST", "/v2/sandboxes", json={"templateID": "base", "timeout": 60})
    if answer.status_code == 201:
        pytest.skip("an unusable KVM was not tested: KVM works here")
    assert re.search("(?i)kvm", answer.json()["message"]), answer.text


def test_a_wrong_flag_is_named(hostd):
    assert "--no-such-flag" in _everything_said(lambda: hostd(no_such_flag="x"))


def _everything_said(start) -> str:
    with pytest.raises(HostdExited) as ended:
        start()
    assert ended.value.code > 0
    return ended.value.stderr


def test_an_unknown_template_is_named_and_nothing_else_is_lost(containers, sandbox):
    answer = containers.request("POST", "/v2/sandboxes", json={"templateID": "no-such-template"})
    assert answer.status_code == 404
    assert "no-such-template" in answer.json()["message"]
    assert sandbox.commands.run("echo here").stdout == "here\n"


# --- broken images ---


@contextmanager
def images_with(broken: str, how: str):
    """The images, with one file of a second template `broken` damaged; `base` stays whole."""
    with tempfile.TemporaryDirectory(prefix="images-", dir="/tmp") as folder:
        images = Path(folder)
        (images / "base").symlink_to(locations.images() / "base")
        (images / "broken").mkdir()
        for file in (locations.images() / "base").iterdir():
            (images / "broken" / file.name).symlink_to(file)
        victim = images / "broken" / broken
        assert victim.exists(), f"the image has no {broken}"
        victim.unlink()
        if how == "truncated":
            with open(locations.images() / "base" / broken, "rb") as whole:
                victim.write_bytes(whole.read(os.fstat(whole.fileno()).st_size // 2))
        elif how == "empty":
            victim.touch()
        yield images


@pytest.mark.parametrize(
    "file, how",
    [
        ("rootfs.squashfs", "truncated"),
        ("vmlinux", "truncated"),
        ("initrd.cpio", "truncated"),
        ("image.json", "empty"),
        ("image.json", "truncated"),
        ("rootfs.squashfs", "missing"),
        ("vmlinux", "missing"),
    ],
)
@pytest.mark.vms(1)
@pytest.mark.takes(40)
def test_a_broken_image_is_named_and_the_others_still_work(hostd, file, how):
    with images_with(file, how) as images:
        try:
            machines = hostd("qemu", images=images)
        except HostdExited as ended:
            assert "broken" in ended.stderr and "panicked" not in ended.stderr
            return
        answer = machines.request("POST", "/v2/sandboxes", json={"templateID": "broken", "timeout": 60})
        assert 400 <= answer.status_code < 600
        assert answer.json()["code"] == answer.status_code
        assert "broken" in answer.json()["message"] or file in answer.json()["message"], answer.text
        assert machines.sandboxes() == []
        assert not _running_qemu(machines), "the failed machine is gone"


def _running_qemu(machines) -> list[str]:
    return [command for command in processes.belonging_to(machines.data).values() if "qemu-system" in command.split()[0]]


@pytest.mark.parametrize("file, how", [("rootfs", "missing"), ("image.json", "empty")])
def test_a_broken_container_image_is_named_and_the_others_still_work(hostd, file, how):
    with images_with(file, how) as images:
        try:
            supervisor = hostd("container", images=images)
        except HostdExited as ended:
            assert "broken" in ended.stderr and "panicked" not in ended.stderr
            return
        answer = supervisor.request("POST", "/v2/sandboxes", json={"templateID": "broken"})
        assert 400 <= answer.status_code < 600
        assert "broken" in answer.json()["message"] or file in answer.json()["message"], answer.text
        assert Sandbox.create(**supervisor.sdk()).commands.run("echo fine").stdout == "fine\n"


# --- a full disk ---


@pytest.fixture
def small_disk():
    folder = Path(tempfile.mkdtemp(prefix="small-disk-", dir="/tmp"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("a full disk was not tested: no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def test_a_full_disk_while_making_the_image_is_said_and_leaves_no_half_image(small_disk):
    whole = {file: file.stat().st_mtime_ns for file in (locations.images() / "base").iterdir()}
    done = subprocess.run(
        [locations.xtask(), "image", "--tree", "--out", small_disk],
        cwd=locations.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode > 0
    assert "panicked" not in done.stderr
    assert re.search(r"(?i)no space left|disk.*full|full.*disk|not enough (disk )?space", done.stderr), done.stderr
    assert str(small_disk) in done.stderr
    assert not list(small_disk.rglob("image.json")), "a half-made image looks like a whole one"
    assert whole == {file: file.stat().st_mtime_ns for file in (locations.images() / "base").iterdir()}


def test_a_full_disk_below_the_data_is_an_answer_and_not_a_crash(hostd, small_disk):
    data = small_disk / "data"
    data.mkdir()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    try:
        supervisor = hostd("container", data=data)
    except HostdExited as ended:
        assert re.search("(?i)space", ended.stderr) and "panicked" not in ended.stderr
        return
    answer = supervisor.request("POST", "/v2/sandboxes", json={"templateID": "base"})
    assert answer.status_code >= 500
    assert re.search("(?i)space|disk", answer.json()["message"]), answer.text
    assert supervisor.process.poll() is None
    assert API_KEY not in supervisor.stderr(), "keys do not belong in logs"
