"""File work has the rights of its user, whatever the user's own processes do to the folders meanwhile."""

import base64
import os
import pwd
import stat
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.connect import call
from harness.folders import USER, folder
from harness.guestd import Guestd

NOBODY = (pwd.getpwnam(USER).pw_uid, pwd.getpwnam(USER).pw_gid)
AS_USER = {"Authorization": "Basic " + base64.b64encode(f"{USER}:".encode()).decode()}

# Exchanges two names as fast as it can, as the user.
SWAPPER = """
import ctypes, os, sys
uid, gid, one, other = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode(), sys.argv[4].encode()
os.setgroups([]); os.setgid(gid); os.setuid(uid)
swap = ctypes.CDLL(None, use_errno=True).renameat2
print(swap(-100, one, -100, other, 2), flush=True)
while True:
    swap(-100, one, -100, other, 2)
"""


@pytest.fixture
def home():
    with folder(USER) as path:
        yield path


@pytest.fixture
def precious():
    """A folder of root's with what must not be touched."""
    with folder() as path:
        (path / "keep").write_text("precious")
        (path / "dir").mkdir()
        (path / "dir/keep").write_text("precious")
        yield path


def fs(agent, method, headers=AS_USER, **request):
    return call(agent, f"filesystem.Filesystem/{method}", request, headers=headers)


def upload(agent, path, content=b"x", user=USER, headers=None):
    return agent.post(
        "/files",
        params={"path": str(path), "username": user},
        content=content,
        headers={"Content-Type": "application/octet-stream", **(headers or {})},
    )


def download(agent, path, user=USER):
    return agent.get("/files", params={"path": str(path), "username": user})


def compose(agent, *sources, destination, user=USER):
    request = {"source_paths": [str(path) for path in sources], "destination": str(destination), "username": user}
    return agent.post("/files/compose", json=request)


def snapshot(path):
    """Everything below a folder: names, owners, modes, contents."""
    found = {}
    for entry in [path, *sorted(path.rglob("*"))]:
        info = entry.lstat()
        content = entry.read_bytes() if stat.S_ISREG(info.st_mode) else None
        found[str(entry)] = (info.st_uid, info.st_gid, info.st_mode, info.st_nlink, content)
    return found


def owner(path):
    info = path.lstat()
    return info.st_uid, info.st_gid



@contextmanager
def swapping(one, other):
    arguments = [sys.executable, "-c", SWAPPER, str(NOBODY[0]), str(NOBODY[1]), str(one), str(other)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "0", "two names can be exchanged here"
        yield
    finally:
        process.kill()
        process.wait()


def test_a_user_gets_nothing_that_is_closed_to_it(agent, precious, home):
    precious.chmod(0o700)
    (home / "mine").write_text("x")
    os.chown(home / "mine", *NOBODY)
    before = snapshot(precious)
    closed = [
        fs(agent, "Stat", path=f"{precious}/keep"),
        fs(agent, "ListDir", path=str(precious)),
        fs(agent, "MakeDir", path=f"{precious}/new"),
        fs(agent, "Move", source=f"{precious}/keep", destination=f"{home}/taken"),
        fs(agent, "Move", source=f"{home}/mine", destination=f"{precious}/given"),
        fs(agent, "Remove", path=f"{precious}/keep"),
    ]
    for answer in closed:
        assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied"), answer.text
        assert f"user '{USER}' may not " in answer.json()["message"]
    atomic = {"Guestd-Replace": "atomic"}
    closed = [
        upload(agent, precious / "keep"),
        upload(agent, precious / "keep", headers=atomic),
        upload(agent, precious / "new/file"),
        download(agent, precious / "keep"),
        compose(agent, precious / "keep", destination=home / "taken"),
        compose(agent, home / "mine", destination=precious / "given"),
    ]
    for answer in closed:
        assert (answer.status_code, answer.json()["code"]) == (403, 403), answer.text
        assert f"user '{USER}' may not " in answer.json()["message"]
    assert snapshot(precious) == before
    assert sorted(path.name for path in home.iterdir()) == ["mine"]


def test_a_user_may_read_what_it_may_not_write(agent, precious):
    assert download(agent, precious / "keep").text == "precious"
    assert fs(agent, "Stat", path=f"{precious}/keep").json()["entry"]["owner"] == "root"
    before = snapshot(precious)
    for answer in (upload(agent, precious / "keep"), upload(agent, precious / "new")):
        assert answer.status_code == 403, answer.text
    assert fs(agent, "Remove", path=f"{precious}/dir").status_code == 403
    assert snapshot(precious) == before


def test_settings_of_the_kernel_are_not_the_users(agent):
    """They are judged by the effective user, not by the one of the file system."""
    before = open("/proc/sys/kernel/core_pattern").read()
    assert upload(agent, "/proc/sys/kernel/core_pattern", b"|/bin/evil").status_code == 403
    assert open("/proc/sys/kernel/core_pattern").read() == before


def test_the_agents_own_descriptors_are_no_way_around(agent, guestd, home):
    (home / "out").symlink_to("/proc/self/fd/2")
    size = guestd.log.stat().st_size
    for path in ("/proc/self/fd/2", home / "out", "/proc/self/environ", "/proc/self/root/etc/hostname"):
        assert download(agent, path).status_code in (400, 403), path
        assert upload(agent, path).status_code in (400, 403), path
    assert guestd.log.stat().st_size == size
    for method in ("CreateWatcher", "ListDir"):
        assert fs(agent, method, path="/proc/self/root/etc").status_code == 400, method


def test_what_is_made_belongs_to_the_user(agent, home):
    assert upload(agent, home / "new/file").status_code == 200
    assert upload(agent, home / "atomic", headers={"Guestd-Replace": "atomic"}).status_code == 200
    assert fs(agent, "MakeDir", path=f"{home}/a/b").status_code == 200
    for path in ("new", "new/file", "atomic", "a", "a/b"):
        assert owner(home / path) == NOBODY, path
    modes = [(home / path).stat().st_mode & 0o777 for path in ("new", "new/file", "atomic", "a/b")]
    assert modes == [0o755, 0o644, 0o644, 0o755]


def test_a_file_of_somebody_else_keeps_its_owner_and_roots_upload_takes_it(agent, home):
    (home / "shared").write_text("x")
    (home / "shared").chmod(0o666)
    assert upload(agent, home / "shared", b"new").status_code == 200
    assert owner(home / "shared") == (0, 0)
    upload(agent, home / "mine")
    assert owner(home / "mine") == NOBODY
    assert upload(agent, home / "mine", user="root").status_code == 200
    assert owner(home / "mine") == (0, 0)


def test_a_write_by_its_user_clears_the_set_user_id_bit(agent, home):
    tool = home / "tool"
    tool.write_text("x")
    tool.chmod(0o4777)
    assert upload(agent, tool, b"evil").status_code == 200
    assert tool.stat().st_mode & 0o7777 == 0o777, "a program of root's was rewritten and still ran as root"


@pytest.mark.parametrize("atomic", [{}, {"Guestd-Replace": "atomic"}])
def test_pipes_and_devices_never_block_and_are_never_written(agent, home, atomic):
    os.mkfifo(home / "pipe")
    os.chown(home / "pipe", *NOBODY)
    (home / "link").symlink_to("pipe")
    reader = os.open(home / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (home / "pipe", home / "link", "/dev/null", "/dev/zero"):
            answers = [upload(agent, path, headers=atomic), download(agent, path)]
            if not str(path).startswith("/dev"):
                answers += [compose(agent, path, destination=home / "c"), compose(agent, __file__, destination=path)]
            for answer in answers:
                assert answer.status_code == 400, f"{path}: {answer.text}"
                assert "is not a regular file" in answer.json()["message"]
        assert os.read(reader, 10) == b""
    finally:
        os.close(reader)
    assert sorted(path.name for path in home.iterdir()) == ["link", "pipe"]


def test_a_loop_of_links_ends(agent, home):
    (home / "a").symlink_to("b")
    (home / "b").symlink_to("a")
    listed = fs(agent, "ListDir", path=f"{home}/a")
    assert (listed.status_code, listed.json()["code"]) == (400, "failed_precondition")
    for answer in (
        download(agent, home / "a"),
        upload(agent, home / "a"),
        upload(agent, home / "a", headers={"Guestd-Replace": "atomic"}),
        upload(agent, home / "a/file"),
        compose(agent, home / "a", destination=home / "c"),
    ):
        assert answer.status_code == 400, answer.text


def test_a_file_in_the_way_of_a_folder_is_told_apart(agent, home):
    upload(agent, home / "file")
    stated = fs(agent, "Stat", path=f"{home}/file/below")
    assert (stated.status_code, stated.json()["code"]) == (404, "not_found"), "an SDK asks `exists` this way"
    for method, request in (
        ("ListDir", {"path": f"{home}/file/below"}),
        ("MakeDir", {"path": f"{home}/file/below"}),
        ("Move", {"source": f"{home}/file", "destination": f"{home}/file/below"}),
    ):
        answer = fs(agent, method, **request)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument"), f"{method}: {answer.text}"
    assert download(agent, home / "file/below").status_code == 404
    assert upload(agent, home / "file/below").status_code == 400


def test_a_move_to_another_disk_takes_everything_along(agent, home):
    if os.stat("/dev/shm").st_dev == home.stat().st_dev:
        pytest.skip("a move between disks was not tested: /dev/shm is on the same one")
    upload(agent, home / "tree/sub/file", b"content")
    (home / "tree/sub/file").chmod(0o750)
    (home / "tree/link").symlink_to("sub/file")
    target = f"/dev/shm/{home.name}"
    try:
        assert fs(agent, "Move", source=f"{home}/tree", destination=target).status_code == 200
        assert not (home / "tree").exists()
        assert open(f"{target}/sub/file", "rb").read() == b"content"
        assert os.stat(f"{target}/sub/file").st_mode & 0o777 == 0o750
        assert os.readlink(f"{target}/link") == "sub/file"
    finally:
        fs(agent, "Remove", headers={}, path=target)


def work(agent, home):
    """One of everything that makes, changes or removes below `home/spot`, and what came of it."""
    spot = home / "spot"
    yield "upload", upload(agent, spot / "keep", b"evil")
    yield "upload new", upload(agent, spot / "fresh", b"evil")
    yield "replace", upload(agent, spot / "keep", b"evil", headers={"Guestd-Replace": "atomic"})
    yield "make", fs(agent, "MakeDir", path=f"{spot}/made/deep")
    yield "move in", fs(agent, "Move", source=f"{home}/mine", destination=f"{spot}/moved")
    yield "move out", fs(agent, "Move", source=f"{spot}/keep", destination=f"{home}/stolen")
    yield "compose", compose(agent, spot / "fresh", destination=spot / "keep")
    yield "remove file", fs(agent, "Remove", path=f"{spot}/keep")
    yield "remove tree", fs(agent, "Remove", path=f"{spot}/dir")


def test_swapping_a_folder_and_a_link_under_a_users_calls_reaches_nothing(agent, home, precious):
    for path in ("spot", "spot/dir"):
        (home / path).mkdir()
        os.chown(home / path, *NOBODY)
    (home / "link").symlink_to(precious)
    os.lchown(home / "link", *NOBODY)
    before = snapshot(precious)
    outcomes = set()
    with swapping(home / "spot", home / "link"):
        end = time.monotonic() + 6
        while time.monotonic() < end:
            upload(agent, home / "mine")
            outcomes.update((what, answer.status_code) for what, answer in work(agent, home))
            assert snapshot(precious) == before, f"something reached what is not the user's: {outcomes}"
    for what in ("upload", "make", "remove tree"):
        seen = {status for name, status in outcomes if name == what}
        assert {200, 403} <= seen, f"the swap was not met on both sides by {what}: {seen}"


def test_swapping_a_folder_and_a_link_under_roots_removal_reaches_nothing(agent, home, precious):
    """Root may remove everything, so only the walk itself keeps it out of what a link points to."""
    (home / "link").symlink_to(precious)
    os.lchown(home / "link", *NOBODY)
    before = snapshot(precious)
    for _ in range(30):
        for number in range(20):
            (home / f"tree/a/sub{number}/dir").mkdir(parents=True)
        (home / "tree/a/sub7/keep").write_text("x")
        subprocess.run(["chown", "-R", USER, home], check=True)
        with swapping(home / "tree/a/sub7", home / "link"):
            fs(agent, "Remove", headers={}, path=f"{home}/tree")
        fs(agent, "Remove", headers={}, path=f"{home}/tree")
        if not os.path.islink(home / "link"):
            fs(agent, "Remove", headers={}, path=f"{home}/link")
            (home / "link").symlink_to(precious)
        assert snapshot(precious) == before


# --- moves between file systems ---


@pytest.fixture
def elsewhere():
    """An agent with mounts of its own: `ro` is read-only and holds `f`, `rw` belongs to the user. A client of it, and a look at its files."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("moves between file systems were not tested: there are no mount namespaces here")
    with folder(USER) as home:
        script = (
            f"mkdir {home}/ro {home}/rw && mount -t tmpfs none {home}/ro && mount -t tmpfs none {home}/rw"
            f" && echo new >{home}/ro/f && mount -o remount,ro {home}/ro && chown {USER} {home}/rw && exec \"$@\""
        )
        agent = Guestd(wrapper=["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"])
        try:
            agent.start()
            with agent.client() as client:
                yield client, home, Path(f"/proc/{agent.process.pid}/root{home}")
        finally:
            agent.close()


def tree(top: Path) -> dict:
    return {path.relative_to(top): path.read_text() if path.is_file() else None for path in top.rglob("*")}


@pytest.mark.parametrize("headers", [AS_USER, {}], ids=[USER, "root"])
@pytest.mark.parametrize("destination", ["victim", "new/deep/file"])
def test_a_move_from_a_read_only_file_system_changes_nothing(elsewhere, headers, destination):
    client, home, seen = elsewhere
    (seen / "victim").write_text("old")
    before = tree(seen)
    moved = fs(client, "Move", headers=headers, source=f"{home}/ro/f", destination=f"{home}/{destination}")
    assert (moved.status_code, moved.json()["code"]) == (400, "failed_precondition"), moved.text
    assert "Read-only file system" in moved.json()["message"]
    assert tree(seen) == before


def test_a_move_of_a_tree_of_which_a_part_has_to_stay_changes_nothing(elsewhere):
    client, home, seen = elsewhere
    for name in "abc":
        (seen / f"rw/tree/{name}/inner").mkdir(parents=True)
        (seen / f"rw/tree/{name}/inner/file").write_text(name)
    for path in (seen / "rw/tree", *(seen / "rw/tree").rglob("*")):
        if "b" not in path.parts:
            os.chown(path, *NOBODY)
    before = tree(seen)
    moved = fs(client, "Move", source=f"{home}/rw/tree", destination=f"{home}/moved")
    assert moved.status_code == 403, moved.text
    assert tree(seen) == before
    moved = fs(client, "Move", headers={}, source=f"{home}/rw/tree", destination=f"{home}/moved")
    assert moved.status_code == 200, moved.text
    assert (seen / "moved/b/inner/file").read_text() == "b" and not (seen / "rw/tree").exists()


def test_what_something_is_mounted_in_is_not_moved(elsewhere):
    """The mount point could not go, and what is mounted there is no part of the tree."""
    client, home, seen = elsewhere
    (seen / "rw/file").write_text("mounted")
    before = tree(seen)
    for source in ("rw", ""):
        moved = fs(client, "Move", headers={}, source=f"{home}/{source}", destination=f"/dev/shm/{home.name}")
        assert (moved.status_code, moved.json()["code"]) == (400, "failed_precondition"), moved.text
        assert tree(seen) == before
        assert not Path("/dev/shm", home.name).exists()
