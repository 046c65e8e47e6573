"""Sections 1.10, 2.5 and 2.7: what is fed to a process, and calls that name one."""

import pytest

from harness.connect import Stream
from harness.planes import b64, end_frame, stream_input

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
CODECS = pytest.mark.parametrize("codec", ["json", "proto"])


# --- stdin ---


@hosted
@contract("2.5/stdin-false", "1.2/StartRequest")
def test_without_stdin_a_read_meets_the_end(plane):
    assert plane.start("/bin/bash", "-c", "read line", stdin=False).exit_code == 1
    assert plane.start("/bin/readlink", "/proc/self/fd/0", stdin=False).stdout == b"/dev/null\n"


@hosted
@pytest.mark.parametrize("stdin", [None, True])
@contract("2.5/stdin-open", "1.2/StartRequest", "1.1/SendInput", "1.1/CloseStdin", "1.2/ProcessInput")
def test_stdin_stays_open_until_it_is_closed(plane, stdin):
    with plane.begin("/bin/cat", stdin=stdin) as response:
        stream = Stream(response)
        who = {"process": {"pid": stream.until("start")["pid"]}}
        for word in ("one ", "two "):
            assert plane.process("SendInput", {**who, "input": {"stdin": b64(word)}}).ok() == {}
        assert plane.process("CloseStdin", who).ok() == {}
        assert stream.rest().stdout == b"one two "
        assert stream.ran.exit_code == 0


@contract("1.10/closestdin-again")
def test_closing_stdin_twice_or_without_one_is_fine(plane):
    for stdin in (True, False):
        with plane.begin("/bin/sleep", "30", stdin=stdin) as response:
            who = {"process": {"pid": Stream(response).until("start")["pid"]}}
            assert plane.process("CloseStdin", who).ok() == {}
            assert plane.process("CloseStdin", who).ok() == {}
            plane.signal(who["process"]["pid"])


@CODECS
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "never-open"])
@contract("1.10/stdin-closed", "1.7/internal")
def test_input_for_a_closed_stdin_is_internal(plane, codec, closed):
    with plane.begin("/bin/sleep", "30", stdin=closed) as response:
        who = {"process": {"pid": Stream(response).until("start")["pid"]}}
        if closed:
            plane.process("CloseStdin", who).ok()
        answer = plane.process("SendInput", {**who, "input": {"stdin": b64("x")}}, codec=codec)
        assert answer.error == (500, "internal", "error writing to stdin: stdin not enabled or closed")
        plane.signal(who["process"]["pid"])


@contract("1.10/stdin-broken")
def test_input_for_a_reader_that_left_is_a_broken_pipe(plane):
    with plane.begin("/bin/bash", "-c", "exec <&-; echo left; sleep 30", stdin=True) as response:
        stream = Stream(response)
        who = {"process": {"pid": stream.until("start")["pid"]}}
        stream.until("data")
        status, code, message = plane.process("SendInput", {**who, "input": {"stdin": b64("x")}}).error
        assert (status, code) == (500, "internal")
        assert "broken pipe" in message.lower()
        plane.signal(who["process"]["pid"])


@hosted
@contract("1.10/wrong-channel")
def test_terminal_input_for_a_command_says_which_channel_to_use(plane):
    with plane.begin("/bin/cat", stdin=True) as response:
        who = {"process": {"pid": Stream(response).until("start")["pid"]}}
        status, code, message = plane.process("SendInput", {**who, "input": {"pty": b64("x")}}).error
        assert (status, code) == (500, "internal")
        assert "stdin" in message
        plane.signal(who["process"]["pid"])


@CODECS
@contract("1.10/no-input", "1.7/unimplemented")
def test_input_of_no_kind_is_unimplemented(plane, codec):
    with plane.begin("/bin/cat", stdin=True) as response:
        who = {"process": {"pid": Stream(response).until("start")["pid"]}}
        for message in ({**who, "input": {}}, who):
            status, code, text = plane.process("SendInput", message, codec=codec).error
            assert (status, code) == (501, "unimplemented")
            assert text.startswith("invalid input type")
        plane.signal(who["process"]["pid"])


# --- selectors ---

BY_SELECTOR = ["SendInput", "SendSignal", "CloseStdin", "Update"]
EXTRA = {
    "SendInput": {"input": {"stdin": "eA=="}},
    "SendSignal": {"signal": "SIGNAL_SIGTERM"},
    "CloseStdin": {},
    "Update": {"pty": {"size": {"cols": 80, "rows": 24}}},
}


@hosted
@pytest.mark.parametrize("method", BY_SELECTOR)
@contract("1.10/pid", "1.10/tag", "1.10/selector", "1.2/ProcessSelector", "1.7/not_found", "1.7/unimplemented")
def test_a_call_says_which_process_it_did_not_find(plane, method):
    def refused(selector: dict | None):
        message = {**({} if selector is None else {"process": selector}), **EXTRA[method]}
        return plane.process(method, message).error

    assert refused({"pid": 4_000_000}) == (404, "not_found", "process with pid 4000000 not found")
    assert refused({"tag": "none"}) == (404, "not_found", "process with tag none not found")
    for nothing in ({}, None):
        status, code, message = refused(nothing)
        assert (status, code) == (501, "unimplemented")
        assert message.startswith("invalid input type")


@hosted
@CODECS
@contract("1.1/Connect", "1.10/pid", "1.10/tag", "1.10/selector", "1.6/status")
def test_joining_nobody_is_told_in_the_end_frame(plane, codec):
    def refused(selector: dict) -> dict:
        ran = plane.stream("Connect", {"process": selector}, codec=codec)
        assert ran.order == ["end frame"]
        return ran.error

    assert refused({"pid": 4_000_000}) == {"code": "not_found", "message": "process with pid 4000000 not found"}
    assert refused({"tag": "none"}) == {"code": "not_found", "message": "process with tag none not found"}
    assert refused({})["code"] == "unimplemented"


# --- StreamInput ---


@hosted
@CODECS
@contract("1.1/StreamInput", "1.2/StreamInputRequest", "1.6/client-stream")
def test_streamed_input_arrives_in_order_with_keepalives_between(plane, codec):
    with plane.begin("/usr/bin/head", "-c", "12", stdin=True) as response:
        stream = Stream(response)
        start = {"start": {"process": {"pid": stream.until("start")["pid"]}}}
        data = [{"data": {"input": {"stdin": b64(word)}}} for word in ("one ", "two ", "six ")]
        answer = stream_input(plane, start, data[0], {"keepalive": {}}, *data[1:], codec=codec)
        assert end_frame(answer) == {"messages": 1}
        assert stream.rest().stdout == b"one two six "


@CODECS
@contract("1.10/streaminput-order", "1.7/failed_precondition")
def test_streamed_data_before_its_start_is_a_failed_precondition(plane, codec):
    answer = stream_input(plane, {"data": {"input": {"stdin": b64("x")}}}, codec=codec)
    assert end_frame(answer)["error"]["code"] == "failed_precondition"
    assert plane.listed() is not None, "the agent lives on"


@contract("1.10/streaminput-event")
def test_a_streamed_event_of_no_kind_is_unimplemented(plane):
    error = end_frame(stream_input(plane, {}))["error"]
    assert error["code"] == "unimplemented"
    assert error["message"].startswith("invalid event type")


@hosted
@contract("1.10/pid", "1.1/StreamInput")
def test_streamed_input_for_nobody_is_not_found(plane):
    error = end_frame(stream_input(plane, {"start": {"process": {"pid": 4_000_000}}}))["error"]
    assert error == {"code": "not_found", "message": "process with pid 4000000 not found"}


@contract("1.10/streaminput-broken", "1.6/malformed")
def test_streamed_input_that_breaks_off_keeps_what_came_whole(plane):
    with plane.begin("/bin/cat", stdin=True) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        data = {"data": {"input": {"stdin": b64("whole")}}}
        answer = stream_input(plane, {"start": {"process": {"pid": pid}}}, data, raw=b"\0\0\0\0\x20{")
        error = end_frame(answer)["error"]
        assert error["code"] == "unknown"
        assert error["message"].startswith("error streaming input")
        assert plane.process("CloseStdin", {"process": {"pid": pid}}).ok() == {}
        assert stream.rest().stdout == b"whole"
