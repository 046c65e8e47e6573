"""Sections 2.8 to 2.12: subscribers, keepalive, deadlines, signals, the list."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.connect import END, JSON_STREAM, Stream, envelope, frames, process
from harness.planes import b64, basic
from harness.processes import wait_until

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd


def finish(plane, *pids: int) -> None:
    for pid in pids:
        plane.signal(pid)


# --- fan-out, no replay, disconnect, retained ends ---


@hosted
@pytest.mark.parametrize("selector", ["pid", "tag"])
@contract("1.1/Connect", "2.8/first", "2.8/no-replay", "1.2/ProcessSelector")
def test_a_joiner_sees_start_and_then_only_what_is_new(plane, selector):
    tag = f"joined-{time.monotonic_ns()}"
    with plane.begin("/bin/bash", "-c", "echo old; read line; echo new; exit 3", stdin=True, tag=tag) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        with plane.join(**({"pid": pid} if selector == "pid" else {"tag": tag})) as second:
            joined = Stream(second)
            assert joined.until("start") == {"pid": pid}
            plane.process("SendInput", {"process": {"pid": pid}, "input": {"stdin": b64("\n")}}).ok()
            ran = joined.rest()
        assert (ran.stdout, ran.exit_code) == (b"new\n", 3)
        assert ran.order == ["start", "data", "end", "end frame"]
        assert stream.rest().stdout == b"old\nnew\n"


@hosted
@contract("2.8/fan-out")
def test_five_readers_each_get_all_of_it(plane):
    with plane.begin("/bin/bash", "-c", "read line; seq 5000", stdin=True) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        opened = [plane.join(pid=pid) for _ in range(4)]
        try:
            readers = [Stream(each.__enter__()) for each in opened]
            for reader in readers:
                reader.until("start")
            plane.process("SendInput", {"process": {"pid": pid}, "input": {"stdin": b64("\n")}}).ok()
            with ThreadPoolExecutor(5) as pool:
                outs = list(pool.map(lambda each: each.rest().stdout, [stream, *readers]))
        finally:
            for each in opened:
                each.__exit__(None, None, None)
    assert set(outs) == {"".join(f"{n}\n" for n in range(1, 5001)).encode()}


@hosted
@contract("2.8/disconnect")
def test_the_process_outlives_every_reader(plane):
    with plane.begin("/bin/sleep", "60") as response:
        pid = Stream(response).until("start")["pid"]
    with plane.join(pid=pid) as response:
        assert Stream(response).until("start") == {"pid": pid}
    time.sleep(0.2)
    assert plane.alive(pid)
    finish(plane, pid)


@contract("2.8/no-replay")
def test_a_process_without_readers_does_not_block(plane, box):
    with plane.begin("/bin/bash", "-c", f"head -c 3000000 /dev/zero; touch {box}/done") as response:
        Stream(response).until("start")
    wait_until(lambda: plane.sh(f"ls {box}") == "done\n", within=5, what="three megabytes went nowhere")


@hosted
@pytest.mark.parametrize("selector", ["pid", "tag"])
@contract("2.8/retained")
def test_the_end_is_kept_for_who_asks_late(plane, selector):
    tag = f"late-{time.monotonic_ns()}"
    ran = plane.start("/bin/bash", "-c", "echo gone; exit 6", tag=tag)
    late = plane.stream("Connect", {"process": {"pid": ran.pid} if selector == "pid" else {"tag": tag}})
    assert late.order == ["start", "end", "end frame"]
    assert (late.pid, late.end, late.stdout) == (ran.pid, ran.end, b"")


@pytest.mark.takes(31)
@contract("2.8/retained")
def test_the_end_is_forgotten_after_30_seconds_and_not_before(plane):
    ran = plane.start("/bin/true", tag="forgotten")
    ended = time.monotonic()
    time.sleep(27)
    assert plane.stream("Connect", {"process": {"pid": ran.pid}}).order == ["start", "end", "end frame"]
    time.sleep(max(0.0, ended + 31.5 - time.monotonic()))
    for selector, text in (({"pid": ran.pid}, f"pid {ran.pid}"), ({"tag": "forgotten"}, "tag forgotten")):
        error = plane.stream("Connect", {"process": selector}).error
        assert error == {"code": "not_found", "message": f"process with {text} not found"}


@contract("2.8/reuse")
def test_a_new_process_with_the_tag_replaces_the_kept_end(plane):
    tag = f"again-{time.monotonic_ns()}"
    first = plane.start("/bin/sh", "-c", "exit 1", tag=tag)
    with plane.begin("/bin/sleep", "30", tag=tag) as response:
        second = Stream(response).until("start")["pid"]
        with plane.join(tag=tag) as joined:
            assert Stream(joined).until("start") == {"pid": second} != {"pid": first.pid}
        finish(plane, second)


@contract("2.8/retained", "1.10/pid")
@pytest.mark.parametrize("method", ["SendInput", "SendSignal", "CloseStdin"])
def test_a_kept_end_is_no_process_to_call(plane, method):
    ran = plane.start("/bin/true")
    extra = {"SendInput": {"input": {"stdin": "eA=="}}, "SendSignal": {"signal": 15}, "CloseStdin": {}}[method]
    answer = plane.process(method, {"process": {"pid": ran.pid}, **extra})
    assert answer.error == (404, "not_found", f"process with pid {ran.pid} not found")


# --- keepalive ---


@pytest.mark.takes(2.5)
@contract("2.9/interval", "1.2/KeepAlive")
@pytest.mark.parametrize("method", ["Start", "Connect"])
def test_a_quiet_stream_is_kept_alive_every_second(plane, method):
    with plane.begin("/bin/sleep", "2.5", headers={"Keepalive-Ping-Interval": "1"}) as response:
        stream = Stream(response)
        if method == "Connect":
            joined = plane.stream(
                "Connect", {"process": {"pid": stream.until("start")["pid"]}}, headers={"Keepalive-Ping-Interval": "1"}
            )
            assert joined.keepalives == 2
            assert joined.order[0] == "start"
        else:
            ran = stream.rest()
            assert ran.order == ["start", "keepalive", "keepalive", "end", "end frame"]


@contract("2.9/interval", "1.5/oneof")
def test_a_keepalive_is_an_empty_message(plane):
    with plane.begin("/bin/sleep", "1.3", headers={"Keepalive-Ping-Interval": "1"}) as response:
        events = list(Stream(response))
    assert {"keepalive": {}} in events


@pytest.mark.takes(3)
@contract("2.9/restart")
def test_output_restarts_the_keepalive_clock(plane):
    script = "for n in 1 2 3 4; do sleep 0.7; echo $n; done"
    ran = plane.start("/bin/bash", "-c", script, headers={"Keepalive-Ping-Interval": "1"})
    assert (ran.stdout, ran.keepalives) == (b"1\n2\n3\n4\n", 0)


@pytest.mark.parametrize("interval", ["0", "-1", "-50", "often", "1.5", "99999999999999999999", ""])
@contract("2.9/default")
def test_an_interval_that_is_none_is_the_default(plane, interval):
    ran = plane.start("/bin/sleep", "0.2", headers={"Keepalive-Ping-Interval": interval})
    assert (ran.exit_code, ran.keepalives, ran.error) == (0, 0, None)


# --- deadlines ---


@hosted
@pytest.mark.takes(1)
@contract("2.10/start", "1.10/deadline", "1.4/python")
@pytest.mark.parametrize("codec", ["json", "proto"])
def test_a_deadline_ends_the_stream_and_kills_the_command(plane, codec):
    began = time.monotonic()
    ran = plane.start("/bin/sleep", "60", headers={"Connect-Timeout-Ms": "600"}, codec=codec)
    assert 0.55 < time.monotonic() - began < 8
    assert ran.order == ["start", "end frame"]
    assert ran.error["code"] == "deadline_exceeded"
    wait_until(lambda: not plane.alive(ran.pid), within=3, what="the command is dead")


@pytest.mark.takes(1)
@contract("2.10/start")
def test_what_came_before_the_deadline_is_delivered(plane):
    ran = plane.start("/bin/bash", "-c", "echo early; sleep 60", headers={"Connect-Timeout-Ms": "600"})
    assert (ran.stdout, ran.error["code"]) == (b"early\n", "deadline_exceeded")


@pytest.mark.takes(1)
@contract("2.10/client-gone")
def test_a_deadline_kills_though_the_client_went_first(plane):
    with plane.begin("/bin/sleep", "60", headers={"Connect-Timeout-Ms": "1000"}) as response:
        pid = Stream(response).until("start")["pid"]
    assert plane.alive(pid)
    wait_until(lambda: not plane.alive(pid), within=4, what="the command is dead")


@hosted
@pytest.mark.takes(1)
@contract("2.10/connect")
def test_a_joiners_deadline_ends_only_its_own_stream(plane):
    with plane.begin("/bin/sleep", "60") as response:
        pid = Stream(response).until("start")["pid"]
        joined = plane.stream("Connect", {"process": {"pid": pid}}, headers={"Connect-Timeout-Ms": "500"})
        assert (joined.order, joined.error["code"]) == (["start", "end frame"], "deadline_exceeded")
        assert plane.alive(pid)
        finish(plane, pid)


@hosted
@pytest.mark.parametrize("timeout", ["0", None])
@contract("2.10/zero")
def test_no_timeout_is_no_deadline(plane, timeout):
    headers = {} if timeout is None else {"Connect-Timeout-Ms": timeout}
    ran = plane.start("/bin/bash", "-c", "sleep 0.3; echo done", headers=headers)
    assert (ran.stdout, ran.error) == (b"done\n", None)


@pytest.mark.parametrize("timeout", ["0", "0000000000"])
@contract("2.10/zero", "2.10/unary")
def test_a_timeout_of_zero_is_no_deadline_of_a_unary_call_either(plane, timeout):
    assert plane.fs("Stat", path="/", _headers={"Connect-Timeout-Ms": timeout}).status == 200
    assert plane.process("List", headers={"Connect-Timeout-Ms": timeout}).status == 200


@pytest.mark.parametrize("timeout", ["soon", "-1", "1.5", "12345678901", "1s", "0x10"])
@contract("1.10/timeout-header", "1.7/invalid_argument")
def test_a_malformed_timeout_is_refused_and_runs_nothing(plane, box, timeout):
    ran = plane.start("/usr/bin/touch", f"{box}/ran", headers={"Connect-Timeout-Ms": timeout})
    assert (ran.order, ran.error["code"]) == (["end frame"], "invalid_argument")
    assert "timeout" in ran.error["message"].lower()
    assert plane.sh(f"ls {box}") == ""
    answer = plane.fs("MakeDir", path=f"{box}/made", _headers={"Connect-Timeout-Ms": timeout})
    assert answer.status == 400
    status, code, message = answer.error
    assert (code, message.split(":")[0]) == ("invalid_argument", "connect-timeout-ms")
    assert plane.sh(f"ls {box}") == ""


@hosted
@contract("2.10/unary", "1.4/python")
def test_a_unary_call_may_carry_a_deadline(plane):
    assert plane.process("List", headers={"Connect-Timeout-Ms": "60000"}).status == 200


@pytest.mark.takes(1)
@contract("2.10/unary", "1.7/deadline_exceeded")
def test_a_unary_call_that_cannot_finish_in_time_says_so(plane):
    with plane.begin("/bin/sleep", "30", stdin=True) as response:
        who = {"process": {"pid": Stream(response).until("start")["pid"]}}
        message = {**who, "input": {"stdin": b64(bytes(1_000_000))}}
        status, code, _ = plane.process("SendInput", message, headers={"Connect-Timeout-Ms": "400"}).error
        assert (status, code) == (504, "deadline_exceeded")
        finish(plane, who["process"]["pid"])


# --- signals ---


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@pytest.mark.parametrize("name, status", [("SIGNAL_SIGTERM", "signal: terminated"), ("SIGNAL_SIGKILL", "signal: killed")])
@contract("1.1/SendSignal", "1.2/Signal", "2.11/term", "2.11/kill", "2.7/signal")
def test_a_signal_ends_a_command(plane, codec, name, status):
    with plane.begin("/bin/sleep", "60") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        message = {"process": {"pid": pid}, "signal": name}
        assert plane.process("SendSignal", message, codec=codec).ok() == {}
        ran = stream.rest()
    assert (ran.exit_code, ran.end["status"], ran.end["error"]) == (-1, status, status)


@hosted
@contract("2.11/kill")
def test_after_a_kill_the_pid_is_gone_for_everybody(plane):
    with plane.begin("/bin/sleep", "60") as response:
        pid = Stream(response).until("start")["pid"]
        assert plane.signal(pid).status == 200
        assert plane.start("/bin/bash", "-c", f"kill -0 {pid}").exit_code == 1
        assert pid not in [each["pid"] for each in plane.listed()]
        assert plane.signal(pid).error == (404, "not_found", f"process with pid {pid} not found")


@contract("1.5/enum-in", "1.2/Signal")
@pytest.mark.parametrize("number", [9, 15])
def test_a_signal_may_be_a_number(plane, number):
    with plane.begin("/bin/sleep", "60") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        plane.process("SendSignal", {"process": {"pid": pid}, "signal": number}).ok()
        assert stream.rest().exit_code == -1


@hosted
@pytest.mark.parametrize("signal", ["SIGNAL_UNSPECIFIED", 0, None, 2])
@contract("1.10/signal", "1.7/unimplemented")
def test_another_signal_is_unimplemented(plane, signal):
    with plane.begin("/bin/sleep", "60") as response:
        pid = Stream(response).until("start")["pid"]
        message = {"process": {"pid": pid}, **({} if signal is None else {"signal": signal})}
        status, code, text = plane.process("SendSignal", message).error
        assert (status, code) == (501, "unimplemented")
        assert text.startswith("invalid signal")
        assert plane.alive(pid)
        finish(plane, pid)


@contract("1.5/enum-in", "1.7/invalid_argument")
def test_a_signal_of_an_unknown_name_is_an_invalid_argument(plane):
    status, code, _ = plane.process("SendSignal", {"process": {"pid": 1}, "signal": "SIGNAL_SIGNOPE"}).error
    assert (status, code) == (400, "invalid_argument")


@contract("1.10/signal-finished")
def test_a_signal_to_a_finished_command_never_hits_another(plane):
    """envd answers internal in the moment between exit and reaping; afterwards, as here, nobody is found."""
    ran = plane.start("/bin/true")
    for name in ("SIGNAL_SIGTERM", "SIGNAL_SIGKILL"):
        status, code, message = plane.signal(ran.pid, name).error
        assert (status, code, message) in [
            (404, "not_found", f"process with pid {ran.pid} not found"),
            (500, "internal", "error sending signal: os: process already finished"),
        ]


@contract("2.11/list")
def test_connect_kill_drain_leaves_an_empty_list(fresh):
    pids = []
    for _ in range(3):
        with fresh.begin("/bin/sleep", "60") as response:
            pids.append(Stream(response).until("start")["pid"])
    assert sorted(each["pid"] for each in fresh.listed()) == sorted(pids)
    for pid in pids:
        with fresh.join(pid=pid) as response:
            stream = Stream(response)
            stream.until("start")
            fresh.signal(pid).ok()
            assert stream.rest().end["status"] == "signal: killed"
    assert fresh.process("List").message == {}


# --- list ---


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("1.1/List", "1.2/ProcessInfo", "1.2/ProcessConfig", "2.12/all")
def test_the_list_shows_what_was_asked_for(plane, codec):
    tag = f"listed-{time.monotonic_ns()}"
    config = process("/bin/sleep", "60", envs={"A": "1"}, cwd="/tmp")
    with plane.begin("/bin/sleep", "60", envs={"A": "1"}, cwd="/tmp", tag=tag, user="nobody") as response:
        pid = Stream(response).until("start")["pid"]
        found = [each for each in plane.process("List", codec=codec).ok()["processes"] if each["pid"] == pid]
        assert found == [{"config": config, "pid": pid, "tag": tag}]
        finish(plane, pid)


@contract("2.12/all", "1.5/optional")
def test_what_was_not_set_is_not_in_the_list(plane):
    with plane.begin("/bin/sleep", "60") as response:
        pid = Stream(response).until("start")["pid"]
        [found] = [each for each in plane.listed() if each["pid"] == pid]
        assert found == {"config": {"cmd": "/bin/sleep", "args": ["60"]}, "pid": pid}
        finish(plane, pid)


@contract("1.5/optional")
def test_a_tag_that_is_set_and_empty_is_in_the_list(plane):
    with plane.begin("/bin/sleep", "60", tag="", cwd="") as response:
        pid = Stream(response).until("start")["pid"]
        [found] = [each for each in plane.listed() if each["pid"] == pid]
        assert (found["tag"], found["config"]["cwd"]) == ("", "")
        finish(plane, pid)


@contract("2.12/same-tag")
def test_two_processes_may_have_one_tag(plane):
    tag = f"twins-{time.monotonic_ns()}"
    pids = []
    for _ in range(2):
        with plane.begin("/bin/sleep", "60", tag=tag) as response:
            pids.append(Stream(response).until("start")["pid"])
    for _ in range(2):
        with plane.join(tag=tag) as response:
            stream = Stream(response)
            pid = stream.until("start")["pid"]
            assert pid in pids
            plane.process("SendSignal", {"process": {"tag": tag}, "signal": "SIGNAL_SIGKILL"}).ok()
        wait_until(lambda: len([p for p in plane.listed() if p.get("tag") == tag]) < 2, within=3, what="one is gone")
    assert [each for each in plane.listed() if each.get("tag") == tag] == []


@contract("2.12/all", "2.1/basic")
def test_any_user_may_see_and_signal_any_process(plane):
    with plane.begin("/bin/sleep", "60", user="root") as response:
        pid = Stream(response).until("start")["pid"]
        answer = plane.process("List", headers=basic("nobody"))
        assert pid in [each["pid"] for each in answer.ok()["processes"]]
        plane.process("SendSignal", {"process": {"pid": pid}, "signal": 9}, user="nobody").ok()


# --- frames on the wire ---


def raw_start(plane, script: str, extra: str = "") -> tuple[list[bytes], list[bytes]]:
    """Response header lines and HTTP chunks of a Start, as they came."""
    message = envelope({"process": process("/bin/sh", "-c", script)})
    with socket.create_connection(plane.address, timeout=20) as connection:
        headers = "".join(f"{name}: {value}\r\n" for name, value in plane.headers.items())
        connection.sendall(
            f"POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON_STREAM}\r\n{headers}{extra}"
            f"Content-Length: {len(message)}\r\n\r\n".encode()
            + message
        )
        reader = connection.makefile("rb")
        lines = list(iter(reader.readline, b"\r\n"))
        pieces = []
        while size := int(reader.readline().strip(), 16):
            pieces.append(reader.read(size))
            reader.readline()
    return lines, pieces


@contract("1.6/one-flush", "1.6/flush", "10/parser", "1.6/envelope")
def test_every_chunk_is_a_whole_number_of_frames(plane):
    lines, pieces = raw_start(plane, "for n in 1 2 3 4; do echo $n; sleep 0.05; done")
    assert lines[0].startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding: chunked\r\n" in [line.lower() for line in lines]
    assert len(pieces) >= 6
    for piece in pieces:
        assert list(frames([piece])), f"no whole frame: {piece!r}"


@hosted
@pytest.mark.takes(1)
@contract("1.6/flush")
def test_each_output_arrives_when_it_is_written(plane):
    with plane.begin("/bin/sh", "-c", "echo a; sleep 0.6; echo b; sleep 0.6; echo c") as response:
        arrived = [time.monotonic() for event in Stream(response) if "data" in event]
    assert len(arrived) == 3
    assert arrived[1] - arrived[0] > 0.4 and arrived[2] - arrived[1] > 0.4


@contract("1.6/buffering", "12/accel")
@pytest.mark.parametrize(
    "method, message",
    [("process.Process/Start", {"process": {"cmd": "/bin/true"}}), ("process.Process/Connect", {"process": {"pid": 1}})],
)
def test_proxies_are_told_not_to_buffer(plane, method, message):
    answer = plane.http.post(f"/{method}", content=envelope(message), headers={"Content-Type": JSON_STREAM})
    assert answer.headers.get("x-accel-buffering") == "no"


@hosted
@contract("1.6/end-frame", "1.6/content-type")
def test_the_last_frame_is_an_empty_json_object(plane):
    body = envelope({"process": process("/bin/true")})
    answer = plane.http.post("/process.Process/Start", content=body, headers={"Content-Type": JSON_STREAM})
    assert answer.headers["content-type"] == JSON_STREAM
    *_, (flags, payload) = frames([answer.content])
    assert (flags, json.loads(payload)) == (END, {})
