"""Section 2.5 and its errors: terminals."""

import re
import time

import pytest

from harness.connect import Stream, process
from harness.planes import HOME, b64, end_frame, stream_input

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
SIZE = {"size": {"cols": 80, "rows": 24}}


def terminal(plane, *argv, size=SIZE, **options):
    return plane.begin(*argv, pty=size, **options)


def type_in(plane, pid: int, text: str):
    return plane.process("SendInput", {"process": {"pid": pid}, "input": {"pty": b64(text)}})


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("2.5/pty", "1.2/PTY", "1.2/DataEvent", "2.6/order")
def test_a_terminals_output_is_pty_data_only(plane, codec):
    ran = plane.start("/bin/sh", "-c", "echo out; echo err >&2; exit 3", pty=SIZE, stdin=None, codec=codec)
    assert (ran.pty, ran.stdout, ran.stderr) == (b"out\r\nerr\r\n", b"", b"")
    assert (ran.order[0], ran.order[-2:]) == ("start", ["end", "end frame"])
    assert (ran.exit_code, ran.end["status"]) == (3, "exit status 3")


@hosted
@pytest.mark.parametrize("cols, rows", [(80, 24), (1, 1), (100, 5), (500, 300)])
@contract("1.2/PTY", "2.5/pty")
def test_the_size_is_the_requests(plane, cols, rows):
    ran = plane.start("/bin/stty", "size", pty={"size": {"cols": cols, "rows": rows}}, stdin=None)
    assert ran.pty.decode() == f"{rows} {cols}\r\n"


@contract("1.2/PTY")
@pytest.mark.parametrize("pty", [{}, {"size": {}}])
def test_a_terminal_without_a_size_is_a_terminal(plane, pty):
    ran = plane.start("/bin/sh", "-c", "test -t 0 && test -t 1 && test -t 2 && echo tty", pty=pty, stdin=None)
    assert ran.pty == b"tty\r\n"


@hosted
@contract("2.2/pty-session", "2.5/pty")
def test_a_terminals_process_leads_a_session_and_owns_the_tty(plane):
    ran = plane.start(
        "/bin/bash", "-c", "echo $$ $(ps -o sid=,tpgid= -p $$); tty; : > /dev/tty && echo controlling", pty=SIZE, stdin=None
    )
    words = ran.pty.decode().split()
    assert words[0] == words[1] == words[2] == str(ran.pid)
    assert re.fullmatch(r"/dev/pts/\d+", words[3])
    assert words[4] == "controlling"


@contract("2.5/pty")
@pytest.mark.parametrize("stdin", [True, False])
def test_the_stdin_field_means_nothing_to_a_terminal(plane, stdin):
    with terminal(plane, "/bin/cat", stdin=stdin) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        type_in(plane, pid, "hello\n").ok()
        type_in(plane, pid, "\x04").ok()
        assert stream.rest().pty == b"hello\r\nhello\r\n"


@hosted
@contract("1.2/ProcessInput", "1.1/SendInput", "2.5/pty")
def test_what_is_typed_is_echoed_and_read(plane):
    with terminal(plane, "/bin/bash", "-c", "read line; echo got $line") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        assert type_in(plane, pid, "word\r").ok() == {}
        ran = stream.rest()
    assert (ran.pty, ran.exit_code) == (b"word\r\ngot word\r\n", 0)


@hosted
@contract("2.5/pty", "2.7/signal")
def test_ctrl_c_interrupts_the_foreground(plane):
    with terminal(plane, "/bin/sh", "-c", "echo ready; exec sleep 60") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        type_in(plane, pid, "\x03").ok()
        ran = stream.rest()
    assert (ran.exit_code, ran.end["status"]) == (-1, "signal: interrupt")


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("1.1/Update", "2.5/resize", "1.2/PTY")
def test_a_new_size_is_seen_by_a_program_that_runs(plane, codec):
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.05; done"
    with terminal(plane, "/bin/bash", "-c", script) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        message = {"process": {"pid": pid}, "pty": {"size": {"cols": 100, "rows": 40}}}
        assert plane.process("Update", message, codec=codec).ok() == {}
        assert stream.rest().pty == b"ready\r\n40 100\r\n"


@contract("1.1/Update")
def test_an_update_without_a_size_changes_nothing(plane):
    with terminal(plane, "/bin/bash", "-c", "read line; stty size") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        assert plane.process("Update", {"process": {"pid": pid}}).ok() == {}
        type_in(plane, pid, "\n").ok()
        assert stream.rest().pty == b"\r\n24 80\r\n"


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("1.10/update", "1.7/internal")
def test_a_command_has_no_size(plane, codec):
    with plane.begin("/bin/sleep", "30") as response:
        pid = Stream(response).until("start")["pid"]
        answer = plane.process("Update", {"process": {"pid": pid}, "pty": SIZE}, codec=codec)
        assert answer.error == (500, "internal", "error resizing tty: tty not assigned to process")
        plane.signal(pid)


@hosted
@contract("1.10/closestdin-pty", "1.7/unknown")
def test_a_terminals_stdin_is_closed_with_ctrl_d(plane):
    with terminal(plane, "/bin/cat") as response:
        pid = Stream(response).until("start")["pid"]
        status, code, message = plane.process("CloseStdin", {"process": {"pid": pid}}).error
        assert (status, code) == (500, "unknown")
        assert "cannot close stdin for PTY process" in message
        assert "Ctrl+D" in message
        plane.signal(pid)


@hosted
@contract("1.10/wrong-channel")
def test_plain_input_for_a_terminal_says_which_channel_to_use(plane):
    with terminal(plane, "/bin/cat") as response:
        pid = Stream(response).until("start")["pid"]
        status, code, message = plane.process("SendInput", {"process": {"pid": pid}, "input": {"stdin": b64("x")}}).error
        assert (status, code) == (500, "internal")
        assert "pty" in message.lower() or "tty" in message.lower()
        plane.signal(pid)


@contract("1.1/StreamInput", "1.2/StreamInputRequest")
def test_input_is_streamed_into_a_terminal(plane):
    with terminal(plane, "/bin/bash", "-c", "stty -echo; echo ready; read a; read b; echo $b $a") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        data = [{"data": {"input": {"pty": b64(word)}}} for word in ("one\n", "two\n")]
        assert end_frame(stream_input(plane, {"start": {"process": {"pid": pid}}}, *data)) == {"messages": 1}
        assert stream.rest().pty.endswith(b"two one\r\n")


@hosted
@contract("1.10/spawn-pty", "1.10/cwd-missing")
@pytest.mark.parametrize("kind", ["file", "denied", "missing"])
def test_a_terminal_in_a_folder_that_cannot_be_entered_is_refused(plane, box, kind):
    if kind == "file":
        plane.put(f"{box}/place")
    elif kind == "denied":
        plane.sh(f"install -d -m 700 {box}/place")
    error = plane.start("/bin/bash", "-i", "-l", cwd=f"{box}/place", pty=SIZE, stdin=None).error
    assert error["code"] == "invalid_argument"
    if kind == "missing":
        assert error["message"] == f"cwd '{box}/place' does not exist"
    else:
        assert error["message"].startswith("error starting pty with command")


@hosted
@contract("2.8/fan-out", "1.1/Connect")
def test_a_terminal_is_joined_by_a_second_reader(plane):
    with terminal(plane, "/bin/bash", "-c", "stty -echo; echo ready; read line; echo $line") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        with plane.join(pid=pid) as second:
            joined = Stream(second)
            assert joined.until("start") == {"pid": pid}
            type_in(plane, pid, "both\n").ok()
            assert joined.rest().pty == b"both\r\n"
        assert stream.rest().pty.endswith(b"both\r\n")


@hosted
@contract("2.11/kill", "2.7/signal")
def test_killing_a_terminal_ends_it_and_hangs_up_its_children(plane):
    with terminal(plane, "/bin/bash", "-c", "sleep 77 & echo $!; wait") as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        child = int(stream.ran.pty.split()[0])
        plane.signal(pid).ok()
        assert stream.rest().end["status"] == "signal: killed"
    deadline = time.monotonic() + 3
    while plane.alive(child):
        assert time.monotonic() < deadline, "the child outlived its terminal"


@contract("2.12/all", "2.5/pty")
def test_a_terminal_is_in_the_list(plane):
    with terminal(plane, "/bin/sleep", "30", tag="a-terminal") as response:
        pid = Stream(response).until("start")["pid"]
        [found] = [each for each in plane.listed() if each["pid"] == pid]
        assert found == {"config": process("/bin/sleep", "30"), "pid": pid, "tag": "a-terminal"}
        plane.signal(pid)


@hosted
@contract("2.3/login", "2.5/pty", "2.3/base")
def test_a_login_shell_is_at_home_and_keeps_its_variables(plane):
    envs = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "MINE": "kept"}
    with terminal(plane, "/bin/bash", "-i", "-l", envs=envs) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        type_in(plane, pid, "echo [$PWD $USER $TERM $MINE]\nexit\n").ok()
        ran = stream.rest()
    assert f"[{HOME} user xterm-256color kept]".encode() in ran.pty
    assert ran.exit_code == 0


@contract("2.6/bytes")
def test_a_terminals_flood_arrives_whole(plane):
    ran = plane.start("/bin/bash", "-c", "stty -opost; seq 100000", pty=SIZE, stdin=None)
    assert ran.pty == "".join(f"{n}\n" for n in range(1, 100_001)).encode()


@pytest.mark.takes(1)
@contract("2.10/start")
def test_a_terminals_deadline_ends_it(plane):
    ran = plane.start("/bin/sleep", "60", pty=SIZE, stdin=None, headers={"Connect-Timeout-Ms": "500"})
    assert (ran.order, ran.error["code"]) == (["start", "end frame"], "deadline_exceeded")
