"""Section 3.4: watchers that are polled and watchers that stream."""

import json
import re
import subprocess
import threading
import time

import pytest

from harness import proto
from harness.connect import END, JSON_STREAM, PROTO_STREAM, envelope, frames
from harness.fuse import EmptyFolder

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
CODECS = pytest.mark.parametrize("codec", ["json", "proto"])
CREATE, WRITE, REMOVE, RENAME, CHMOD = (f"EVENT_TYPE_{name}" for name in ("CREATE", "WRITE", "REMOVE", "RENAME", "CHMOD"))


class Watcher:
    """A polled watcher; `told()` is what it says now, without waiting."""

    def __init__(self, plane, path: str, codec: str = "json", **options):
        self.plane, self.codec = plane, codec
        self.id = plane.fs("CreateWatcher", codec, path=path, **options).ok()["watcherId"]

    def events(self) -> list[dict]:
        return self.plane.fs("GetWatcherEvents", self.codec, watcherId=self.id).ok().get("events", [])

    def told(self) -> list[tuple[str, str]]:
        return [(event["type"], event.get("name", "")) for event in self.events()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.plane.fs("RemoveWatcher", watcherId=self.id)


def upload(plane, path: str, content: bytes = b"x"):
    answer = plane.http.post("/files", params={"path": path}, files={"file": ("file", content)})
    assert answer.status_code == 200, answer.text


# --- polled ---


@hosted
@CODECS
@contract("1.1/CreateWatcher", "1.1/GetWatcherEvents", "1.1/RemoveWatcher", "1.3/Watcher", "3.4/id", "3.4/drain")
def test_a_watcher_is_made_asked_emptied_and_removed(plane, box, codec):
    watcher = Watcher(plane, box, codec)
    assert re.fullmatch(r"w[a-z0-9]{20}", watcher.id)
    assert watcher.events() == []
    plane.put(f"{box}/file")
    assert watcher.events() and watcher.events() == []
    assert plane.fs("RemoveWatcher", codec, watcherId=watcher.id).ok() == {}
    unknown = (404, "not_found", f"watcher with id {watcher.id} not found")
    assert plane.fs("GetWatcherEvents", codec, watcherId=watcher.id).error == unknown
    assert plane.fs("RemoveWatcher", codec, watcherId=watcher.id).error == unknown


@contract("1.10/watcher", "1.7/not_found")
@pytest.mark.parametrize("method", ["GetWatcherEvents", "RemoveWatcher"])
@pytest.mark.parametrize("name", ["", "w", "waaaaaaaaaaaaaaaaaaaa"])
def test_an_unknown_watcher_is_not_found(plane, method, name):
    assert plane.fs(method, watcherId=name).error == (404, "not_found", f"watcher with id {name} not found")


@hosted
@CODECS
@contract("1.10/watch-missing", "1.10/watch-file")
def test_what_cannot_be_watched_says_why(plane, box, codec):
    plane.put(f"{box}/file")
    status, code, message = plane.fs("CreateWatcher", codec, path=f"{box}/none").error
    assert (status, code) == (404, "not_found")
    assert f"{box}/none" in message and "not found" in message
    status, code, message = plane.fs("CreateWatcher", codec, path=f"{box}/file").error
    assert (status, code) == (400, "invalid_argument")
    assert f"{box}/file" in message and "not a directory" in message


@hosted
@CODECS
@contract("3.4/upload-3", "3.4/name", "3.4/mapping", "1.3/FilesystemEvent")
def test_a_fresh_upload_is_create_chmod_write_at_once(plane, box, codec):
    with Watcher(plane, box, codec) as watcher:
        upload(plane, f"{box}/new.txt")
        assert watcher.told() == [(CREATE, "new.txt"), (CHMOD, "new.txt"), (WRITE, "new.txt")]


@hosted
@contract("3.4/mapping")
def test_an_upload_over_a_file_is_a_write(plane, box):
    upload(plane, f"{box}/file")
    with Watcher(plane, box) as watcher:
        upload(plane, f"{box}/file", b"longer than before")
        told = watcher.told()
    assert (WRITE, "file") in told
    assert (CREATE, "file") not in told


@hosted
@contract("3.4/nested", "3.4/recursive", "3.4/name")
def test_a_folder_made_in_a_watched_tree_is_watched_at_once(plane, box):
    with Watcher(plane, box, recursive=True) as watcher:
        plane.fs("MakeDir", path=f"{box}/dir").ok()
        upload(plane, f"{box}/dir/file")
        told = watcher.told()
    assert told[0] == (CREATE, "dir")
    assert (CREATE, "dir/file") in told and (WRITE, "dir/file") in told


@contract("3.4/recursive")
def test_folders_nested_at_once_are_all_watched(plane, box):
    with Watcher(plane, box, recursive=True) as watcher:
        plane.fs("MakeDir", path=f"{box}/a/b/c").ok()
        upload(plane, f"{box}/a/b/c/file")
        told = watcher.told()
    for expected in [(CREATE, "a"), (CREATE, "a/b"), (CREATE, "a/b/c"), (WRITE, "a/b/c/file")]:
        assert expected in told


@hosted
@contract("3.4/recursive")
@pytest.mark.parametrize("recursive", [True, False])
def test_only_a_recursive_watcher_sees_below_its_folder(plane, box, recursive):
    plane.sh(f"cd {box}; mkdir -p one/two; chown -R user:user one")
    with Watcher(plane, box, recursive=recursive) as watcher:
        plane.sh(f"echo x > {box}/one/two/file")
        told = watcher.told()
    assert ((WRITE, "one/two/file") in told) is recursive
    assert any(name.startswith("one/two") for _, name in told) is recursive


@pytest.mark.parametrize(
    "action, expected",
    [
        ("touch new", [(CREATE, "new"), (CHMOD, "new")]),
        ("mkdir new", [(CREATE, "new")]),
        ("ln -s nothing new", [(CREATE, "new")]),
        ("echo more >> old", [(WRITE, "old")]),
        ("truncate -s 0 old", [(WRITE, "old")]),
        ("chmod 600 old", [(CHMOD, "old")]),
        ("chown nobody old", [(CHMOD, "old")]),
        ("rm old", [(REMOVE, "old")]),
        ("rmdir folder", [(REMOVE, "folder")]),
        ("mv old other", [(RENAME, "old"), (CREATE, "other")]),
        ("mv old /tmp/conformance-moved; rm /tmp/conformance-moved", [(RENAME, "old")]),
        ("cat old", []),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
@contract("3.4/mapping", "3.4/name")
def test_each_change_has_its_event(plane, box, action, expected):
    plane.sh(f"cd {box}; echo x > old; mkdir folder")
    with Watcher(plane, box) as watcher:
        plane.sh(f"cd {box}; {action}")
        told = watcher.told()
    if action.startswith(("touch", "mv old /tmp")):
        # Times are attributes, and leaving the file system removes what was copied: what else the tool does is its own.
        assert told[: len(expected) - 1] == expected[:-1] or told[0] in expected
    else:
        assert [event for event in told if event[0] != CHMOD or event in expected] == expected


@hosted
@CODECS
@contract("3.4/entry", "1.3/FilesystemEvent", "1.3/WatchDirRequest")
def test_entries_come_with_what_still_exists(plane, box, codec):
    plane.put(f"{box}/old")
    with Watcher(plane, box, codec, includeEntry=True) as watcher:
        upload(plane, f"{box}/new", b"12345")
        plane.sh(f"rm {box}/old")
        events = watcher.events()
    [removed] = [event for event in events if event["type"] == REMOVE]
    assert "entry" not in removed
    created = [event for event in events if event["name"] == "new"]
    assert [event["type"] for event in created] == [CREATE, CHMOD, WRITE]
    for event in created:
        assert event["entry"]["path"] == f"{box}/new"
        assert (event["entry"]["name"], event["entry"]["owner"]) == ("new", "user")


@hosted
@contract("3.4/entry")
def test_without_asking_there_are_no_entries(plane, box):
    with Watcher(plane, box) as watcher:
        upload(plane, f"{box}/new")
        assert all(set(event) == {"name", "type"} for event in watcher.events())


@contract("3.4/name", "3.1/relative")
def test_a_watcher_takes_a_path_below_home_and_a_link(plane, box):
    short = box.removeprefix("/home/user/")
    plane.sh(f"ln -s {box} {box}-link")
    for path in (short, f"~/{short}", f"{box}-link"):
        with Watcher(plane, path) as watcher:
            plane.sh(f"echo x >> {box}/file")
            assert (WRITE, "file") in watcher.told(), path


@contract("3.4/drain")
def test_two_watchers_of_one_folder_do_not_take_from_each_other(plane, box):
    with Watcher(plane, box) as one, Watcher(plane, box) as two:
        assert one.id != two.id
        upload(plane, f"{box}/file")
        assert one.told() == two.told() != []


@contract("3.4/recursive")
def test_a_linked_folder_is_not_followed(plane, box):
    plane.sh(f"cd {box}; mkdir tree other; ln -s ../other tree/link")
    with Watcher(plane, f"{box}/tree", recursive=True) as watcher:
        plane.sh(f"echo x > {box}/other/file")
        assert watcher.told() == []


@contract("3.4/name", "3.4/mapping")
def test_the_folder_itself_is_a_dot(plane, box):
    with Watcher(plane, box) as watcher:
        plane.sh(f"chmod 700 {box}")
        assert (CHMOD, ".") in watcher.told()


@pytest.fixture
def network(plane, box):
    """A folder that is a FUSE mount, in the agent's own mount namespace."""
    plane.sh(f"mkdir {box}/net")
    try:
        mount = EmptyFolder(plane.guestd.process.pid, f"{box}/net").__enter__()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a network mount was not tested: no FUSE file system can be mounted here ({error})")
    yield f"{box}/net"
    mount.__exit__()


@contract("1.10/watch-network", "3.4/network", "1.3/WatchDirRequest")
def test_a_network_mount_is_watched_only_when_asked_for(plane, network):
    refused = "cannot watch path on network filesystem: " + network
    assert plane.fs("CreateWatcher", path=network).error == (400, "invalid_argument", refused)
    assert plane.fs("CreateWatcher", "proto", path=network, recursive=True).error == (400, "invalid_argument", refused)
    with Stream(plane, {"path": network}) as stream:
        assert stream.ended.wait(5)
        assert stream.error == {"code": "invalid_argument", "message": refused}
    for spelling in ("allowNetworkMounts", "allow_network_mounts"):
        watcher = plane.fs("CreateWatcher", path=network, **{spelling: True}).ok()["watcherId"]
        plane.fs("RemoveWatcher", watcherId=watcher).ok()


# --- streamed ---


class Stream:
    """A WatchDir stream that is read in a thread of its own."""

    def __init__(self, plane, message: dict, codec: str = "json", headers: dict | None = None):
        self.messages, self.error, self.ended = [], None, threading.Event()
        self.codec = codec
        kind = JSON_STREAM if codec == "json" else PROTO_STREAM
        body = message if codec == "json" else proto.request("filesystem.Filesystem/WatchDir", message)
        self.context = plane.http.stream(
            "POST", "/filesystem.Filesystem/WatchDir", content=envelope(body), headers={"Content-Type": kind, **(headers or {})}
        )
        self.response = self.context.__enter__()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        try:
            for flags, payload in frames(self.response.iter_raw()):
                if flags & END:
                    self.error = json.loads(payload).get("error")
                elif self.codec == "json":
                    self.messages.append(json.loads(payload))
                else:
                    self.messages.append(proto.reply("filesystem.Filesystem/WatchDir", payload))
        except Exception as error:  # the test closed the stream
            self.error = self.error or {"code": f"broken: {error}"}
        self.ended.set()

    def wait_for(self, condition, within: float = 5):
        deadline = time.monotonic() + within
        while not (found := [message for message in list(self.messages) if condition(message)]):
            assert time.monotonic() < deadline, f"not within {within} s: {self.messages} {self.error}"
            assert not self.ended.is_set() or self.messages, f"the stream ended: {self.error}"
            time.sleep(0.01)
        return found[0]

    def event(self, kind: str, name: str) -> dict:
        wanted = lambda each: (each.get("filesystem", {}).get("type"), each.get("filesystem", {}).get("name")) == (kind, name)  # noqa: E731
        return self.wait_for(wanted)["filesystem"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.__exit__(None, None, None)


@hosted
@CODECS
@contract("1.1/WatchDir", "1.3/WatchDirRequest", "1.3/WatchDirResponse", "3.4/stream", "3.4/mapping")
def test_a_stream_starts_with_start_and_tells_each_change(plane, box, codec):
    with Stream(plane, {"path": box}, codec) as stream:
        stream.wait_for(lambda message: "start" in message)
        assert stream.messages[0] == {"start": {}}
        plane.sh(f"cd {box}; echo x > file; mv file moved; rm moved")
        for kind, name in ((CREATE, "file"), (WRITE, "file"), (RENAME, "file"), (CREATE, "moved"), (REMOVE, "moved")):
            assert set(stream.event(kind, name)) == {"type", "name"}


@hosted
@contract("3.4/entry", "3.4/recursive", "1.3/WatchDirResponse")
def test_a_stream_tells_entries_of_nested_files(plane, box):
    with Stream(plane, {"path": box, "recursive": True, "includeEntry": True}) as stream:
        stream.wait_for(lambda message: "start" in message)
        plane.fs("MakeDir", path=f"{box}/a/b").ok()
        upload(plane, f"{box}/a/b/file", b"123")
        assert stream.event(CREATE, "a")["entry"]["type"] == "FILE_TYPE_DIRECTORY"
        assert stream.event(WRITE, "a/b/file")["entry"]["path"] == f"{box}/a/b/file"


@hosted
@contract("1.10/watch-missing", "1.10/watch-file", "1.6/status", "3.1/other-home")
@pytest.mark.parametrize(
    "path, code, text",
    [
        ("{}/none", "not_found", "not found"),
        ("{}/file", "invalid_argument", "not a directory"),
        ("~nobody", "invalid_argument", "home"),
    ],
)
def test_a_stream_of_what_cannot_be_watched_ends_in_its_error(plane, box, path, code, text):
    plane.put(f"{box}/file")
    with Stream(plane, {"path": path.format(box)}) as stream:
        assert stream.ended.wait(5)
        assert stream.messages == []
        assert stream.error["code"] == code
        assert text in stream.error["message"]


@pytest.mark.takes(2)
@contract("2.9/interval", "1.3/WatchDirResponse")
@CODECS
def test_a_quiet_stream_is_kept_alive(plane, box, codec):
    with Stream(plane, {"path": box}, codec, {"Keepalive-Ping-Interval": "1"}) as stream:
        stream.wait_for(lambda message: message == {"keepalive": {}}, within=3)


@hosted
@pytest.mark.takes(1)
@contract("3.4/stream", "2.10/connect")
def test_a_stream_ends_at_its_deadline(plane, box):
    with Stream(plane, {"path": box}, headers={"Connect-Timeout-Ms": "600"}) as stream:
        assert stream.ended.wait(5)
        assert stream.error["code"] == "deadline_exceeded"
        assert stream.messages == [{"start": {}}]


@contract("3.4/stream", "1.5/snake")
def test_a_stream_reads_both_spellings(plane, box):
    with Stream(plane, {"path": box, "include_entry": True, "allow_network_mounts": True}) as stream:
        stream.wait_for(lambda message: "start" in message)
        upload(plane, f"{box}/file")
        assert stream.event(WRITE, "file")["entry"]["name"] == "file"


@contract("3.4/mapping")
def test_a_thousand_files_are_all_told(plane, box):
    with Stream(plane, {"path": box}) as stream:
        stream.wait_for(lambda message: "start" in message)
        plane.sh(f"cd {box}; seq 1000 | xargs touch")
        stream.event(CREATE, "1000")
        created = [each["filesystem"]["name"] for each in stream.messages if each.get("filesystem", {}).get("type") == CREATE]
        assert created == [str(n) for n in range(1, 1001)]
