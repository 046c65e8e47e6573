"""What the kernel tells a watcher of an upload: SDKs count these events, so they are part of the contract (envd.md section 3.4)."""

import base64
import ctypes
import os
import struct
from contextlib import contextmanager

import pytest

from harness.connect import call
from harness.folders import USER, folder

LIBC = ctypes.CDLL(None, use_errno=True)
# Bits of inotify(7), under the names that the filesystem service gives them.
NAMES = {0x2: "WRITE", 0x4: "CHMOD", 0x40: "RENAME", 0x80: "CREATE", 0x100: "CREATE", 0x200: "REMOVE"}


@contextmanager
def watched(path):
    """Yields a function that returns `(event, name)` of everything that happened."""
    queue = LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert LIBC.inotify_add_watch(queue, str(path).encode(), sum(NAMES)) >= 0

    def events():
        try:
            raw, found = os.read(queue, 65536), []
        except BlockingIOError:
            return []
        while raw:
            _, mask, _, length = struct.unpack("iIII", raw[:16])
            found.append((NAMES[mask & sum(NAMES)], raw[16 : 16 + length].rstrip(b"\0").decode()))
            raw = raw[16 + length :]
        return found

    try:
        yield events
    finally:
        os.close(queue)


def upload(agent, path, user, content=b"x", headers=None):
    headers = {"Content-Type": "application/octet-stream", **(headers or {})}
    answer = agent.post("/files", params={"path": str(path), "username": user}, content=content, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("user", ["root", USER])
def test_a_fresh_upload_is_create_chmod_write_and_nothing_more(agent, user):
    with folder(USER) as home, watched(home) as events:
        upload(agent, home / "octets", user)
        assert events() == [("CREATE", "octets"), ("CHMOD", "octets"), ("WRITE", "octets")]
        agent.post("/files", params={"path": f"{home}/part", "username": user}, files={"file": ("f", b"x")})
        assert events() == [("CREATE", "part"), ("CHMOD", "part"), ("WRITE", "part")]


def test_overwriting_in_place_is_writes_alone(agent):
    with folder(USER) as home:
        upload(agent, home / "file", USER)
        with watched(home) as events:
            upload(agent, home / "file", USER, b"new")
            assert set(events()) == {("WRITE", "file")}


def test_replacing_at_once_ends_with_the_file_coming_into_its_place(agent):
    with folder(USER) as home:
        upload(agent, home / "file", USER)
        with watched(home) as events:
            upload(agent, home / "file", USER, b"new", {"Guestd-Replace": "atomic"})
            found = events()
            assert found[-1] == ("CREATE", "file")
            assert ("WRITE", "file") not in found


@pytest.mark.parametrize("user", ["root", USER])
def test_a_new_folder_is_create_and_chmod(agent, user):
    named = {"Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()}
    with folder(USER) as home, watched(home) as events:
        call(agent, "filesystem.Filesystem/MakeDir", {"path": f"{home}/new"}, headers=named)
        assert events() == [("CREATE", "new"), ("CHMOD", "new")]
