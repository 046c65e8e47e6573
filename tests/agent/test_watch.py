"""Watching directories over the wire: what is told, in which order, and what happens when too much is."""

import json
import os
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.connect import END, call, frames, open_stream
from harness.processes import wait_until

SERVICE = "filesystem.Filesystem"


def types(events) -> list[tuple[str, str]]:
    return [(event["type"].removeprefix("EVENT_TYPE_"), event["name"]) for event in events]


def create(agent, path, **options) -> str:
    answer = call(agent, f"{SERVICE}/CreateWatcher", {"path": str(path), **options})
    assert answer.status_code == 200, answer.text
    return answer.json()["watcherId"]


def poll(agent, watcher: str) -> list[dict]:
    answer = call(agent, f"{SERVICE}/GetWatcherEvents", {"watcherId": watcher})
    assert answer.status_code == 200, answer.text
    return answer.json().get("events", [])


def upload(agent, path, content: bytes = b"content") -> None:
    answer = agent.post("/files", params={"path": str(path)}, files={"file": ("f", content)})
    assert answer.status_code == 200, answer.text


class Watch:
    """An open WatchDir stream."""

    def __init__(self, response):
        self.frames = frames(response.iter_raw())
        self.error = None

    def next(self) -> dict | None:
        flags, payload = next(self.frames)
        message = json.loads(payload)
        if flags & END:
            self.error = message.get("error")
            return None
        return message

    def events(self, count: int) -> list[tuple[str, str]]:
        found = []
        while len(found) < count:
            message = self.next()
            assert message is not None, f"ended after {found}: {self.error}"
            if "filesystem" in message:
                found.append(message["filesystem"])
        return types(found)


@contextmanager
def watching(agent, path, headers=None, **options):
    with open_stream(agent, f"{SERVICE}/WatchDir", {"path": str(path), **options}, headers) as response:
        assert response.status_code == 200, response.read()
        watch = Watch(response)
        yield watch


@contextmanager
def started(agent, path, headers=None, **options):
    with watching(agent, path, headers, **options) as watch:
        assert watch.next() == {"start": {}}
        yield watch


def inotify(guestd) -> tuple[int, int]:
    """How many inotify instances the agent has, and how many directories it watches."""
    instances = watches = 0
    for info in Path(f"/proc/{guestd.process.pid}/fdinfo").iterdir():
        try:
            if os.readlink(f"/proc/{guestd.process.pid}/fd/{info.name}") != "anon_inode:inotify":
                continue
            watches += sum(line.startswith("inotify") for line in info.read_text().splitlines())
            instances += 1
        except OSError:
            continue
    return instances, watches


# --- what is told ---


def test_a_fresh_upload_is_create_chmod_write_at_once(agent, tmp_path):
    watcher = create(agent, tmp_path)
    assert re.fullmatch("w[a-z0-9]{20}", watcher)
    for round in range(50):
        upload(agent, tmp_path / f"f{round}")
        expected = [(kind, f"f{round}") for kind in ("CREATE", "CHMOD", "WRITE")]
        assert types(poll(agent, watcher)) == expected
    assert poll(agent, watcher) == []


def test_an_overwrite_is_told_as_a_write(agent, tmp_path):
    upload(agent, tmp_path / "f")
    watcher = create(agent, tmp_path)
    upload(agent, tmp_path / "f", b"other")
    assert ("WRITE", "f") in types(poll(agent, watcher))


def test_make_dir_then_upload_into_it_is_told_at_once(agent, tmp_path):
    watcher = create(agent, tmp_path, recursive=True)
    for round in range(50):
        assert call(agent, f"{SERVICE}/MakeDir", {"path": f"{tmp_path}/d{round}"}).status_code == 200
        upload(agent, tmp_path / f"d{round}/f")
        events = types(poll(agent, watcher))
        for expected in (("CREATE", f"d{round}"), ("CREATE", f"d{round}/f"), ("WRITE", f"d{round}/f")):
            assert events.count(expected) == 1, events


def test_make_dir_then_upload_into_it_reaches_a_stream(agent, guestd, tmp_path):
    with started(agent, tmp_path, recursive=True) as watch, guestd.client() as other:
        for round in range(50):
            assert call(other, f"{SERVICE}/MakeDir", {"path": f"{tmp_path}/d{round}"}).status_code == 200
            upload(other, tmp_path / f"d{round}/f")
            events = []
            while ("WRITE", f"d{round}/f") not in events:
                events += watch.events(1)
            assert events.count(("CREATE", f"d{round}")) == 1, events
            assert events.count(("CREATE", f"d{round}/f")) == 1, events


def test_move_and_remove_are_told_with_the_names_of_before_and_after(agent, tmp_path):
    upload(agent, tmp_path / "a")
    watcher = create(agent, tmp_path)
    call(agent, f"{SERVICE}/Move", {"source": f"{tmp_path}/a", "destination": f"{tmp_path}/b"})
    call(agent, f"{SERVICE}/Remove", {"path": f"{tmp_path}/b"})
    assert types(poll(agent, watcher)) == [("RENAME", "a"), ("CREATE", "b"), ("REMOVE", "b")]


def test_a_removed_root_is_told_as_a_dot_and_the_watcher_stays(agent, tmp_path):
    (tmp_path / "d").mkdir()
    watcher = create(agent, tmp_path / "d")
    (tmp_path / "d").rmdir()
    assert types(poll(agent, watcher)) == [("REMOVE", ".")]
    assert poll(agent, watcher) == []
    assert call(agent, f"{SERVICE}/RemoveWatcher", {"watcherId": watcher}).json() == {}


def test_entries_come_only_with_what_exists(agent, tmp_path):
    watcher = create(agent, tmp_path, includeEntry=True)
    upload(agent, tmp_path / "f")
    events = poll(agent, watcher)
    assert [event["entry"]["path"] for event in events] == [f"{tmp_path}/f"] * 3
    assert events[-1]["entry"]["size"] == "7"
    (tmp_path / "f").unlink()
    assert poll(agent, watcher) == [{"name": "f", "type": "EVENT_TYPE_REMOVE"}]


# --- what is refused ---


def test_errors_are_those_of_the_contract(agent, tmp_path):
    (tmp_path / "f").touch()
    missing = call(agent, f"{SERVICE}/CreateWatcher", {"path": f"{tmp_path}/none"})
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert missing.json()["message"] == f"path {tmp_path}/none not found"
    file = call(agent, f"{SERVICE}/CreateWatcher", {"path": f"{tmp_path}/f"})
    assert (file.status_code, file.json()["code"]) == (400, "invalid_argument")
    assert file.json()["message"] == f"path {tmp_path}/f not a directory"
    for method in ("GetWatcherEvents", "RemoveWatcher"):
        unknown = call(agent, f"{SERVICE}/{method}", {"watcherId": "wnone"})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
        assert unknown.json()["message"] == "watcher with id wnone not found"
    with watching(agent, tmp_path / "none") as watch:
        assert watch.next() is None
        assert watch.error["code"] == "not_found"
    with watching(agent, tmp_path, {"Connect-Timeout-Ms": "soon"}) as watch:
        assert watch.next() is None
        assert watch.error["code"] == "invalid_argument"


def test_a_watcher_belongs_to_no_user_and_no_connection(guestd, agent, tmp_path):
    watcher = create(agent, tmp_path)
    with guestd.client(auth=("nobody", "")) as other:
        (tmp_path / "f").touch()
        assert ("CREATE", "f") in types(poll(other, watcher))
        call(other, f"{SERVICE}/RemoveWatcher", {"watcherId": watcher})
    assert call(agent, f"{SERVICE}/GetWatcherEvents", {"watcherId": watcher}).status_code == 404


# --- streams ---


def test_a_stream_ends_with_its_deadline(agent, tmp_path):
    begun = time.monotonic()
    with started(agent, tmp_path, {"Connect-Timeout-Ms": "500"}) as watch:
        assert watch.next() is None
    assert watch.error["code"] == "deadline_exceeded"
    assert 0.4 < time.monotonic() - begun < 3


@pytest.mark.parametrize("interval", ["0", "-1", "x"])
def test_an_interval_that_makes_no_sense_is_the_default(agent, tmp_path, interval):
    headers = {"Keepalive-Ping-Interval": interval, "Connect-Timeout-Ms": "1500"}
    with started(agent, tmp_path, headers) as watch:
        assert watch.next() is None


def test_keepalives_come_while_nothing_happens(agent, tmp_path):
    headers = {"Keepalive-Ping-Interval": "1"}
    with started(agent, tmp_path, headers) as watch:
        begun = time.monotonic()
        for _ in range(3):
            assert watch.next() == {"keepalive": {}}
        assert 1.5 < time.monotonic() - begun < 4


# --- bursts and losses ---


@pytest.mark.parametrize("stream", [False, True])
def test_no_nested_create_is_missed_in_a_burst(guestd, agent, tmp_path, stream):
    count = 1000
    expected = {("CREATE", f"d{n}{rest}") for n in range(count) for rest in ("", "/a", "/a/b", "/a/b/f")}
    expected |= {("WRITE", f"d{n}/a/b/f") for n in range(count)}

    def work():
        for number in range(count):
            (tmp_path / f"d{number}/a/b").mkdir(parents=True)
            (tmp_path / f"d{number}/a/b/f").write_text("x")

    worker = threading.Thread(target=work)
    told = []
    if stream:
        with started(agent, tmp_path, {"Connect-Timeout-Ms": "60000"}, recursive=True) as watch:
            worker.start()
            left = set(expected)
            while left:
                event = watch.events(1)[0]
                left.discard(event)
                told.append(event)
    else:
        watcher = create(agent, tmp_path, recursive=True)
        worker.start()
        while worker.is_alive():
            told += types(poll(agent, watcher))
        told += types(poll(agent, watcher))
    worker.join()
    assert expected <= set(told), sorted(expected - set(told))[:5]
    created = [event for event in told if event[0] == "CREATE"]
    assert len(created) == len(set(created))


def test_a_poll_that_lost_events_says_so_once_and_goes_on(agent, tmp_path):
    watcher = create(agent, tmp_path, recursive=True)
    for number in range(20_000):
        (tmp_path / f"f{number}").touch()
    (tmp_path / "late").mkdir()
    lost = call(agent, f"{SERVICE}/GetWatcherEvents", {"watcherId": watcher})
    assert (lost.status_code, lost.json()["code"]) == (500, "internal")
    assert lost.json()["message"].startswith("events were lost: ")
    poll(agent, watcher)
    (tmp_path / "late/f").write_text("x")
    assert types(poll(agent, watcher)) == [("CREATE", "late/f"), ("WRITE", "late/f")]


def stalled_stream(guestd, path) -> socket.socket:
    """A client that asks for a watch and never reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", guestd.port))
    message = json.dumps({"path": str(path)}).encode()
    body = struct.pack(">BI", 0, len(message)) + message
    head = f"POST /{SERVICE}/WatchDir HTTP/1.1\r\nHost: x\r\nContent-Type: application/connect+json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def test_a_stalled_client_loses_its_own_events_and_delays_nobody(guestd, agent, tmp_path):
    stalled = stalled_stream(guestd, tmp_path)
    wait_until(lambda: inotify(guestd) == (1, 1), within=5, what="the stalled client watches")
    with started(agent, tmp_path) as live:
        slowest = 0
        for batch in range(400):
            begun = time.monotonic()
            for number in range(100):
                (tmp_path / f"{'long' * 20}-{batch}-{number}").mkdir()
            assert len(live.events(100)) == 100
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 1, f"a hundred events took {slowest:.2f} s"
        # The stalled client now reads: some events, the notice, and then what happens after it.
        stalled.settimeout(20)
        received = b""
        while b'"overflow"' not in received:
            piece = stalled.recv(1 << 20)
            assert piece, "the stream of the stalled client ended"
            received = received[-100:] + piece
        (tmp_path / "after").mkdir()
        while b'"after"' not in received:
            piece = stalled.recv(1 << 20)
            assert piece, "the stream of the stalled client ended"
            received = received[-100:] + piece
    stalled.close()


# --- clients that go, and silence ---


def test_streams_of_gone_clients_leave_nothing(guestd, tmp_path):
    before = len(os.listdir(f"/proc/{guestd.process.pid}/fd"))
    clients = []
    for number in range(200):
        folder = tmp_path / f"d{number}"
        folder.mkdir()
        clients.append(stalled_stream(guestd, folder))
    wait_until(lambda: inotify(guestd) == (1, 200), within=20, what="200 directories are watched by one instance")
    for client in clients:
        client.close()
    wait_until(lambda: inotify(guestd) == (0, 0), within=20, what="nothing is watched any more")
    wait_until(
        lambda: len(os.listdir(f"/proc/{guestd.process.pid}/fd")) <= before, within=20, what="no descriptor is left"
    )


def test_removed_watchers_leave_nothing(guestd, agent, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    watchers = [create(agent, tmp_path, recursive=True) for _ in range(200)]
    assert inotify(guestd) == (1, 3)
    for watcher in watchers:
        assert call(agent, f"{SERVICE}/RemoveWatcher", {"watcherId": watcher}).status_code == 200
    wait_until(lambda: inotify(guestd) == (0, 0), within=10, what="nothing is watched any more")


def switches(guestd) -> int:
    total = 0
    for task in Path(f"/proc/{guestd.process.pid}/task").iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)[1])
    return total


@pytest.mark.takes(70)
def test_fifty_open_watches_wake_nobody(guestd, agent, tmp_path):
    streams = [stalled_stream(guestd, tmp_path) for _ in range(50)]
    for _ in range(50):
        create(agent, tmp_path, recursive=True)
    # Threads of the pool end after ten seconds without work, and memory goes back to the kernel 31 s after the last change.
    time.sleep(35)
    before = switches(guestd)
    time.sleep(30)
    assert switches(guestd) - before <= 3
    for stream in streams:
        stream.close()
