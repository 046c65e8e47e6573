"""Output of a process as its clients see it: live, late, again, all at once, and too slowly."""

import base64
import json
import socket
import threading
import time

import pytest

from harness.connect import (
    END,
    JSON_STREAM,
    Ran,
    Stream,
    connect,
    envelope,
    frames,
    open_stream,
    process,
    proto_field,
    proto_fields,
    start,
    varint,
)
from harness.processes import wait_until

OFFSETS = {"Guestd-Output-Offset": "0"}

# What the agent keeps of one process, and of all of them.
LOG = 1 << 20
LOGS = 8 << 20


def shell(script: str, **request) -> dict:
    return {"process": process("/bin/bash", "-c", script), **request}


def joined(agent, pid: int, offset: int | None = None, headers: dict | None = None):
    asked = {} if offset is None else {"fromOffset": str(offset)}
    return open_stream(agent, "process.Process/Connect", {"process": {"pid": pid}, **asked}, headers)


def pieces(response):
    """(offset, bytes) of each data event, (offset, None) of each gap, until the end."""
    for flags, payload in frames(response.iter_raw()):
        message = json.loads(payload)
        if flags & END:
            assert "error" not in message, message
            return
        event = message["event"]
        if "data" in event:
            data = event["data"]
            (value,) = (data[name] for name in ("stdout", "stderr") if name in data)
            yield int(data["offset"]), base64.b64decode(value)
        elif "gap" in event:
            yield int(event["gap"].get("from", 0)), None


def detached(agent, script: str) -> int:
    """Starts a command and goes."""
    with open_stream(agent, "process.Process/Start", shell(script)) as response:
        return Stream(response).until("start")["pid"]


def resident(guestd) -> int:
    with open(f"/proc/{guestd.process.pid}/smaps_rollup") as rollup:
        return next(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Rss:"))


class Raw:
    """A stream on a socket of its own that is read when the test says so, and not before."""

    def __init__(self, guestd, method: str, message: dict, headers: dict | None = None):
        body = envelope(message)
        head = {"Host": "x", "Content-Type": JSON_STREAM, "Content-Length": str(len(body)), **(headers or {})}
        lines = [f"POST /{method} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        self.socket = socket.create_connection(("127.0.0.1", guestd.port))
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def messages(self):
        """(flags, payload) until the end frame."""
        with self.socket.makefile("rb") as stream:
            while stream.readline().strip():
                pass
            yield from frames(self._chunks(stream))

    @staticmethod
    def _chunks(stream):
        while size := int(stream.readline(), 16):
            yield stream.read(size)
            stream.readline()

    def close(self) -> None:
        self.socket.close()


def test_a_client_that_comes_back_at_its_offset_misses_nothing_and_sees_nothing_twice(agent):
    script = "for n in $(seq 2000); do echo line $n; if (( n % 100 == 0 )); then sleep 0.02; fi; done"
    expected = b"".join(b"line %d\n" % n for n in range(1, 2001))
    seen, pid, visits = b"", None, 0
    while len(seen) < len(expected):
        if pid is None:
            stream = open_stream(agent, "process.Process/Start", shell(script), OFFSETS)
        else:
            stream = joined(agent, pid, len(seen))
        with stream as response:
            visits += 1
            for count, (flags, payload) in enumerate(frames(response.iter_raw())):
                event = json.loads(payload).get("event", {})
                pid = event.get("start", {}).get("pid", pid)
                if "data" in event:
                    assert int(event["data"].get("offset", 0)) == len(seen)
                    seen += base64.b64decode(event["data"]["stdout"])
                if count >= 5:
                    break
    assert seen == expected
    assert visits > 2


def test_the_header_asks_as_the_message_does(agent):
    ran = start(agent, "/bin/echo", "hello")
    with joined(agent, ran.pid, headers={"Guestd-Output-Offset": "2"}) as response:
        assert list(pieces(response)) == [(2, b"llo\n")]
    with joined(agent, ran.pid, offset=4, headers={"Guestd-Output-Offset": "2"}) as response:
        assert list(pieces(response)) == [(4, b"o\n")]


def test_output_that_is_not_kept_any_more_is_marked_as_a_gap(agent):
    pid = detached(agent, f"head -c {4 * LOG} /dev/zero; sleep 1")
    wait_until(lambda: whole(agent, pid) == 4 * LOG, within=10, what="all was written")
    with joined(agent, pid, 5) as response:
        (gap, none), *rest = pieces(response)
    assert (gap, none) == (5, None)
    assert rest[0][0] > 5
    assert sum(len(data) for _, data in rest) == 4 * LOG - rest[0][0]
    assert 4 * LOG - rest[0][0] > LOG // 2, "the log is worth its memory"


def whole(agent, pid: int) -> int:
    """How much a process has written: what the agent says to an offset that is too high."""
    with joined(agent, pid, 1 << 62) as response:
        (_, payload) = list(frames(response.iter_raw()))[-1]
    error = json.loads(payload)["error"]
    assert error["code"] == "out_of_range" and "from_offset" in error["message"], error
    return int(error["message"].rsplit(" ", 1)[1])


def test_a_plain_connect_sees_new_output_only_and_no_offsets(agent):
    with open_stream(agent, "process.Process/Start", shell("echo old; read; echo new")) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        with joined(agent, pid) as second:
            late = Stream(second)
            late.until("start")
            send = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(b"\n").decode()}}
            assert agent.post("/process.Process/SendInput", json=send).status_code == 200
            assert late.until("data") == {"stdout": base64.b64encode(b"new\n").decode()}
            assert late.rest().end["exited"]


@pytest.mark.parametrize("offset", ["-1", "soon", "", "1.5", "99999999999999999999"])
def test_an_offset_that_cannot_be_read_is_an_invalid_argument_and_runs_nothing(agent, tmp_path, offset):
    touch = {"process": process("/usr/bin/touch", str(tmp_path / "ran"))}
    for method, message in (("Start", touch), ("Connect", {"process": {"pid": 1}})):
        with open_stream(agent, f"process.Process/{method}", message, {"Guestd-Output-Offset": offset}) as response:
            body = response.read()
        assert b"invalid_argument" in body and b"guestd-output-offset" in body
    assert not (tmp_path / "ran").exists()


def test_a_start_has_no_output_before_its_first_byte(agent, tmp_path):
    touch = {"process": process("/usr/bin/touch", str(tmp_path / "ran"))}
    with open_stream(agent, "process.Process/Start", touch, {"Guestd-Output-Offset": "1"}) as response:
        assert b"out_of_range" in response.read()
    assert not (tmp_path / "ran").exists()


def test_offsets_count_stdout_and_stderr_as_one_and_the_codecs_agree(agent):
    ran = start(agent, "/bin/bash", "-c", "echo out; sleep 0.1; echo err >&2; sleep 0.1; echo again")
    with joined(agent, ran.pid, 0) as response:
        assert list(pieces(response)) == [(0, b"out\n"), (4, b"err\n"), (8, b"again\n")]
    # ConnectRequest{process: ProcessSelector{pid}, from_offset: 1}
    request = proto_field(1, varint(1 << 3) + varint(ran.pid)) + varint(100 << 3) + varint(1)
    headers = {"Content-Type": "application/connect+proto"}
    answer = agent.post("/process.Process/Connect", content=envelope(request), headers=headers).content
    events = [proto_fields(proto_fields(payload)[1][0]) for flags, payload in frames([answer]) if not flags & END]
    data = [proto_fields(event[2][0]) for event in events if 2 in event]
    assert data == [{1: [b"ut\n"], 100: [1]}, {2: [b"err\n"], 100: [4]}, {1: [b"again\n"], 100: [8]}]


def test_an_ended_process_replays_what_is_kept_and_then_ends(agent):
    ran = start(agent, "/bin/bash", "-c", "echo first; echo second; exit 3")
    with joined(agent, ran.pid, 6) as response:
        late = Stream(response).rest()
    assert late.order == ["start", "data", "end", "end frame"]
    assert (late.stdout, late.exit_code) == (b"second\n", 3)
    assert connect(agent, pid=ran.pid).order == ["start", "end", "end frame"], "who does not ask sees what envd shows"


def test_output_of_a_detached_process_is_kept_for_who_comes_back(agent):
    pid = detached(agent, "sleep 0.3; echo alone; sleep 0.7")
    time.sleep(0.6)
    with joined(agent, pid, 0) as response:
        assert list(pieces(response)) == [(0, b"alone\n")]


def test_fifty_readers_of_one_process_get_equal_bytes(guestd, agent):
    with open_stream(agent, "process.Process/Start", shell("read; seq 60000")) as response:
        own = Stream(response)
        pid = own.until("start")["pid"]
        readers = [Raw(guestd, "process.Process/Connect", {"process": {"pid": pid}}) for _ in range(50)]
        results: list[Ran] = []

        def follow(reader):
            ran = Ran()
            for flags, payload in reader.messages():
                if flags & END:
                    ran.error = json.loads(payload).get("error")
                    break
                ran.take(json.loads(payload)["event"])
                if ran.order == ["start"]:
                    ready.release()
            results.append(ran)

        ready = threading.Semaphore(0)
        threads = [threading.Thread(target=follow, args=(reader,)) for reader in readers]
        for thread in threads:
            thread.start()
        for _ in readers:
            assert ready.acquire(timeout=20)
        send = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(b"\n").decode()}}
        assert agent.post("/process.Process/SendInput", json=send).status_code == 200
        assert own.rest().stdout == "".join(f"{n}\n" for n in range(1, 60001)).encode()
        for thread in threads:
            thread.join(30)
    assert len(results) == 50
    assert {ran.stdout for ran in results} == {own.ran.stdout}


@pytest.mark.takes(5)
def test_a_stalled_client_is_cut_off_and_the_live_one_is_not_delayed(guestd, agent):
    size = 100 << 20
    with open_stream(agent, "process.Process/Start", shell(f"read; head -c {size} /dev/zero")) as response:
        live = frames(response.iter_raw())
        pid = json.loads(next(live)[1])["event"]["start"]["pid"]
        stalled = Raw(guestd, "process.Process/Connect", {"process": {"pid": pid}})
        time.sleep(0.3)
        send = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(b"\n").decode()}}
        assert agent.post("/process.Process/SendInput", json=send).status_code == 200
        count, longest, last = 0, 0.0, time.monotonic()
        for flags, payload in live:
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            if not flags & END:
                count += len(base64.b64decode(json.loads(payload)["event"].get("data", {}).get("stdout", "")))
    assert count == size
    # The promise is 10 ms, held with paused time by a unit test; here a shared machine is allowed its own pauses.
    assert longest < 3, longest
    *_, (flags, payload) = stalled.messages()
    assert flags & END
    assert json.loads(payload)["error"]["code"] == "data_loss"


@pytest.mark.takes(10)
def test_a_client_that_is_slow_and_reads_on_loses_nothing_beside_a_fast_one(guestd, agent):
    size, rate = 12 << 20, 2e6
    with open_stream(agent, "process.Process/Start", shell(f"read; head -c {size} /dev/zero")) as response:
        live = frames(response.iter_raw())
        pid = json.loads(next(live)[1])["event"]["start"]["pid"]
        slow, results = Raw(guestd, "process.Process/Connect", {"process": {"pid": pid}}), []

        def creep():
            count, began = 0, time.monotonic()
            for flags, payload in slow.messages():
                if flags & END:
                    results.append((count, json.loads(payload)))
                    return
                count += len(base64.b64decode(json.loads(payload)["event"].get("data", {}).get("stdout", "")))
                time.sleep(max(0, began + count / rate - time.monotonic()))

        creeping = threading.Thread(target=creep)
        creeping.start()
        time.sleep(0.3)
        send = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(b"\n").decode()}}
        assert agent.post("/process.Process/SendInput", json=send).status_code == 200
        events = [json.loads(payload)["event"] for flags, payload in live if not flags & END]
        assert sum(len(base64.b64decode(event.get("data", {}).get("stdout", ""))) for event in events) == size
    creeping.join(60)
    assert results == [(size, {})]


@pytest.mark.takes(10)
def test_a_lone_stalled_client_holds_the_process_back_and_loses_nothing(guestd):
    size = 40 << 20
    alone = Raw(guestd, "process.Process/Start", shell(f"head -c {size} /dev/zero"))
    time.sleep(2)
    count, ended = 0, False
    for flags, payload in alone.messages():
        if flags & END:
            break
        event = json.loads(payload)["event"]
        count += len(base64.b64decode(event.get("data", {}).get("stdout", "")))
        ended |= "end" in event
    assert (count, ended) == (size, True)


@pytest.mark.takes(25)
def test_a_flood_with_a_stalled_client_leaves_the_memory_flat(guestd, agent):
    flood = {"process": process("/bin/bash", "-c", "exec timeout 20 yes")}
    with open_stream(agent, "process.Process/Start", flood) as response:
        events = frames(response.iter_raw())
        pid = json.loads(next(events)[1])["event"]["start"]["pid"]
        stalled = Raw(guestd, "process.Process/Connect", {"process": {"pid": pid}})
        began, early, peak = time.monotonic(), None, 0
        for count, _ in enumerate(events):
            if count % 100 == 0 and time.monotonic() > began + 2:
                early = early or resident(guestd)
                peak = max(peak, resident(guestd))
            if time.monotonic() > began + 18:
                break
        stalled.close()
    assert peak - early < 1 << 20, (early, peak)
    assert peak < 24 << 20


@pytest.mark.takes(20)
def test_logs_of_many_processes_stay_within_their_budget(guestd, agent):
    """100 MiB of output that nobody has read, in processes that live on: the agent keeps 8 of it."""
    before = resident(guestd)
    pids = [detached(agent, f"head -c {LOG} /dev/zero; sleep 60") for _ in range(100)]
    wait_until(lambda: all(whole(agent, pid) == LOG for pid in pids), within=15, what="all was written")
    assert resident(guestd) - before < LOGS + (8 << 20)
    for pid in pids:
        signal = {"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}
        assert agent.post("/process.Process/SendSignal", json=signal).status_code == 200


def test_a_keepalive_comes_an_interval_after_the_last_data(agent):
    script = "for n in 1 2 3 4; do echo $n; sleep 0.6; done; sleep 1.7"
    ran = start(agent, "/bin/bash", "-c", script, headers={"Keepalive-Ping-Interval": "1"})
    assert ran.order[:5] == ["start", "data", "data", "data", "data"], "data puts it off"
    assert ran.keepalives == 2


def test_streams_ask_proxies_not_to_buffer(agent):
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/true")}) as response:
        assert response.headers["x-accel-buffering"] == "no"
    assert "x-accel-buffering" not in agent.post("/process.Process/List", json={}).headers


def test_the_oldest_python_client_gets_messages_as_they_were(agent, tmp_path):
    (tmp_path / "file").write_text("x")
    old = {"User-Agent": "connect-python"}
    stat = agent.post("/filesystem.Filesystem/Stat", json={"path": str(tmp_path / "file")}, headers=old)
    assert stat.headers["x-e2b-legacy-sdk"] == "true"
    assert set(stat.json()["entry"]) == {"name", "type", "path"}
    listed = agent.post("/filesystem.Filesystem/ListDir", json={"path": str(tmp_path)}, headers=old).json()
    assert [set(entry) for entry in listed["entries"]] == [{"name", "type", "path"}]
    with open_stream(agent, "process.Process/Start", shell("echo hi"), {**old, **OFFSETS}) as response:
        assert response.headers["x-e2b-legacy-sdk"] == "true"
        assert Stream(response).until("data") == {"stdout": base64.b64encode(b"hi\n").decode()}
    new = agent.post("/filesystem.Filesystem/Stat", json={"path": str(tmp_path / "file")})
    assert "x-e2b-legacy-sdk" not in new.headers and "size" in new.json()["entry"]
