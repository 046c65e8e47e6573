"""Terminals: bytes, sizes, signals, and what is left of them."""

import base64
import os
import re
import time
from contextlib import contextmanager

import pytest

from harness.connect import Stream, call, connect, envelope, frames, open_stream, process, start
from harness.processes import alive, wait_until

SIZE = {"cols": 80, "rows": 24}
BASH = ("/bin/bash", "--norc", "--noprofile", "-i")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def of(pid: int) -> dict:
    return {"process": {"pid": pid}}


class Shell:
    """An open terminal, read by one client."""

    def __init__(self, agent, stream: Stream):
        self.agent, self.stream = agent, stream
        self.pid = stream.until("start")["pid"]

    def type(self, text: str):
        answer = call(self.agent, "process.Process/SendInput", {**of(self.pid), "input": {"pty": b64(text)}})
        assert answer.status_code == 200, answer.text

    def read_until(self, pattern: str) -> re.Match:
        """Reads on until all that was ever shown matches."""
        while not (found := re.search(pattern, self.stream.ran.pty.decode(errors="replace"), re.MULTILINE)):
            self.stream.until("data")
        return found

    def resize(self, **size):
        return call(self.agent, "process.Process/Update", {**of(self.pid), "pty": {"size": size}})

    def signal(self, name: str):
        return call(self.agent, "process.Process/SendSignal", {**of(self.pid), "signal": name})


@contextmanager
def terminal(agent, *argv: str, size: dict | None = None, headers: dict | None = None, **config):
    config.setdefault("envs", {"PS1": "ready> ", "TERM": "xterm-256color"})
    message = {"process": process(*(argv or BASH), **config), "pty": {"size": size or SIZE}}
    with open_stream(agent, "process.Process/Start", message, headers) as response:
        assert response.status_code == 200, response.read()
        shell = Shell(agent, Stream(response))
        yield shell
        if shell.stream.ran.end is None:
            shell.signal("SIGNAL_SIGKILL")


def test_all_output_is_the_terminals_and_the_exit_code_is_exact(agent):
    ran = start(agent, "/bin/bash", "-c", "echo out; echo err >&2; tty; exit 4", pty={"size": SIZE})
    assert (ran.stdout, ran.stderr) == (b"", b"")
    assert re.fullmatch(rb"out\r\nerr\r\n/dev/pts/\d+\r\n", ran.pty), ran.pty
    assert (ran.order[0], ran.order[-2], ran.exit_code) == ("start", "end", 4)
    assert ran.end["record"]["ptyBytes"] == str(len(ran.pty))


def test_the_command_leads_a_session_with_a_controlling_terminal_of_its_users_own(agent):
    script = 'read -r _ _ _ _ _ sid tty _ < /proc/$$/stat; echo "$(($$ == sid)) $((tty != 0))"; stat -c %U $(tty); echo x > /dev/tty'
    ran = start(
        agent,
        "/bin/bash",
        "-c",
        script,
        cwd="/",
        pty={"size": SIZE},
        headers={"Authorization": "Basic bm9ib2R5Og=="},
    )
    assert ran.pty == b"1 1\r\nnobody\r\nx\r\n"


@pytest.mark.takes(10)
def test_the_first_bytes_of_200_quick_terminals_all_arrive(agent):
    for n in range(200):
        ran = start(agent, "/bin/echo", f"first-{n}", pty={"size": SIZE})
        assert (ran.pty, ran.exit_code) == (f"first-{n}\r\n".encode(), 0)


def test_the_last_bytes_of_a_long_output_arrive(agent):
    ran = start(agent, "/bin/bash", "-c", "seq 20000; printf end", pty={"size": SIZE})
    assert ran.pty == b"".join(b"%d\r\n" % n for n in range(1, 20001)) + b"end"


def test_a_resize_is_seen_by_a_shell_that_runs_already(agent):
    with terminal(agent) as shell:
        shell.read_until("ready> ")
        shell.type("tput cols; tput lines\n")
        shell.read_until(r"80\r\n24\r\n")
        assert shell.resize(cols=100, rows=30).status_code == 200
        shell.type("tput cols; tput lines\n")
        shell.read_until(r"100\r\n30\r\n")


def test_a_resize_wakes_the_foreground_program(agent):
    script = "trap 'stty size; exit' WINCH; echo up; while :; do sleep 0.05; done"
    with terminal(agent, "/bin/bash", "-c", script) as shell:
        shell.read_until("up")
        assert shell.resize(cols=132, rows=43).status_code == 200
        assert shell.stream.rest().pty == b"up\r\n43 132\r\n"


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ({"cols": 65536 + 100, "rows": 65536 + 50}, b"50 100\r\n"),
        ({"cols": 4294967295, "rows": 1}, b"1 65535\r\n"),
        ({"cols": 0, "rows": 65536}, b"24 80\r\n"),
    ],
)
def test_a_size_is_cut_to_16_bits_and_never_zero(agent, size, shown):
    assert start(agent, "/bin/stty", "size", pty={"size": size}).pty == shown


def test_a_terminal_without_a_size_or_a_kind_has_usual_ones(agent):
    ran = start(agent, "/bin/bash", "-c", "stty size; echo $TERM", pty={})
    assert ran.pty == b"24 80\r\nxterm-256color\r\n"
    ran = start(agent, "/bin/bash", "-c", "echo $TERM", pty={}, envs={"TERM": "vt100"})
    assert ran.pty == b"vt100\r\n"
    assert start(agent, "/usr/bin/env").stdout.count(b"TERM=") == 0


def test_ctrl_c_ends_the_foreground_job_and_not_the_shell(agent):
    with terminal(agent) as shell:
        shell.read_until("ready> ")
        shell.type("sleep 100 & sleep 200\n")
        wait_until(lambda: children(shell.pid) == ["sleep", "sleep"], within=5, what="both jobs run")
        shell.type("\x03")
        wait_until(lambda: children(shell.pid) == ["sleep"], within=5, what="the foreground job is gone")
        shell.type("echo code=$?\n")
        shell.read_until("code=130")


def children(pid: int) -> list[str]:
    return os.popen(f"ps -o comm= --ppid {pid}").read().split()


def test_sigterm_reaches_the_foreground_job(agent):
    """An interactive shell ignores it; what the user is looking at does not."""
    with terminal(agent) as shell:
        shell.read_until("ready> ")
        shell.type("sleep 200\n")
        wait_until(lambda: children(shell.pid) == ["sleep"], within=5, what="the job runs")
        assert shell.signal("SIGNAL_SIGTERM").status_code == 200
        wait_until(lambda: children(shell.pid) == [], within=5, what="the job is gone")
        shell.type("echo still $((40+2))\n")
        shell.read_until("still 42")


def test_sigkill_ends_the_session(agent):
    with terminal(agent) as shell:
        shell.read_until("ready> ")
        shell.type("sleep 300\n")
        wait_until(lambda: children(shell.pid) == ["sleep"], within=5, what="the job runs")
        job = int(os.popen(f"ps -o pid= --ppid {shell.pid}").read())
        assert shell.signal("SIGNAL_SIGKILL").status_code == 200
        assert not alive(shell.pid)
        wait_until(lambda: not alive(job), within=5, what="the foreground job is gone")
        end = shell.stream.rest().end
        assert (end["status"], end["record"]["cause"]) == ("signal: killed", "killed")
        assert end["record"]["killedBy"] == "SendSignal SIGKILL by root"


def test_control_d_ends_the_input(agent):
    with terminal(agent, "/bin/cat") as shell:
        shell.type("typed\n\x04")
        assert shell.stream.rest().pty == b"typed\r\ntyped\r\n"


def test_a_stream_of_input_types_in_order(agent):
    with terminal(agent, "/bin/bash", "-c", "stty -echo; echo up; head -n 300") as shell:
        shell.read_until("up")
        messages = [{"start": of(shell.pid)}, {"keepalive": {}}]
        messages += [{"data": {"input": {"pty": b64(f"line {n}\n")}}} for n in range(300)]
        answer = agent.post(
            "/process.Process/StreamInput",
            content=b"".join(envelope(message) for message in messages),
            headers={"Content-Type": "application/connect+json"},
        )
        assert [b"error" in payload for _, payload in frames([answer.content])] == [False, False]
        assert shell.stream.rest().pty == b"up\r\n" + b"".join(b"line %d\r\n" % n for n in range(300))


def test_each_kind_of_process_refuses_the_others_input(agent):
    stdin, pty = {"input": {"stdin": "eA=="}}, {"input": {"pty": "eA=="}}
    with terminal(agent, "/bin/cat") as shell:
        answer = call(agent, "process.Process/SendInput", {**of(shell.pid), **stdin})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "pty" in answer.json()["message"]
        answer = call(agent, "process.Process/CloseStdin", of(shell.pid))
        assert (answer.status_code, answer.json()) == (
            500,
            {
                "code": "unknown",
                "message": "error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead",
            },
        )
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/cat")}) as response:
        pid = Stream(response).until("start")["pid"]
        answer = call(agent, "process.Process/SendInput", {**of(pid), **pty})
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "stdin" in answer.json()["message"]
        answer = call(agent, "process.Process/Update", {**of(pid), "pty": {"size": SIZE}})
        assert answer.json() == {"code": "internal", "message": "error resizing tty: tty not assigned to process"}
        call(agent, "process.Process/SendSignal", {**of(pid), "signal": "SIGNAL_SIGKILL"})


def test_a_terminal_that_cannot_start_says_pty(agent):
    ran = start(agent, "/bin/cat", cwd="/etc/passwd", pty={"size": SIZE})
    assert ran.error["code"] == "invalid_argument"
    assert ran.error["message"].startswith("error starting pty with command '/bin/cat'")


def test_a_client_that_comes_back_finds_the_terminal_at_work(agent):
    with terminal(agent) as shell:
        shell.read_until("ready> ")
        with open_stream(agent, "process.Process/Connect", of(shell.pid)) as response:
            second = Shell(agent, Stream(response))
            second.type("echo $((6*7))\n")
            second.read_until("42")
            assert b"ready> echo" not in second.stream.ran.pty, "no replay"
        shell.read_until("42")


def test_a_program_that_never_reads_does_not_hold_its_writer_for_ever(agent):
    with terminal(agent, "/bin/bash", "-c", "stty raw -echo; echo up; sleep 100") as shell:
        shell.read_until("up")
        began = time.monotonic()
        answer = call(
            agent,
            "process.Process/SendInput",
            {**of(shell.pid), "input": {"pty": b64("x" * 1_000_000)}},
            headers={"Connect-Timeout-Ms": "700"},
        )
        assert answer.json()["code"] == "deadline_exceeded"
        assert time.monotonic() - began < 3
        assert shell.signal("SIGNAL_SIGKILL").status_code == 200


@pytest.mark.takes(15)
def test_300_terminals_leave_no_descriptor_and_no_zombie(guestd, agent):
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{guestd.process.pid}/fd"))

    start(agent, "/bin/true", pty={"size": SIZE})
    before = descriptors()
    for n in range(300):
        if n % 3:
            start(agent, "/bin/true", pty={"size": SIZE})
        else:
            with terminal(agent, "/bin/sleep", "100") as shell:
                pid = shell.pid
            wait_until(lambda: not alive(pid), within=5, what="the terminal's command is gone")
    wait_until(lambda: descriptors() <= before, within=5, what="every descriptor is given back")
    stats = os.popen(f"ps -o stat= --ppid {guestd.process.pid}").read().split()
    assert not [stat for stat in stats if stat.startswith("Z")]


def test_an_open_terminal_counts_at_each_byte_and_not_for_being_open(agent):
    control = {"x-guestd-control": "secret"}
    assert agent.post("/init", json={}, headers=control).status_code == 204

    def report() -> dict:
        return call(agent, "activity.v1.Activity/Get", headers=control).json()

    with terminal(agent) as shell:
        shell.read_until("ready> ")
        time.sleep(1.2)
        quiet = report()
        assert quiet.get("counting", 0) == 0, quiet
        assert int(quiet.get("idleForMs", 0)) >= 1000, quiet
        assert [hold["class"] for hold in quiet["holds"]] == ["terminal"]
        shell.type("echo $((1+1))\n")
        shell.read_until(r"\b2\r")
        assert int(report().get("idleForMs", 0)) < 1000


def test_an_open_stream_of_input_counts_for_its_bytes_only(agent):
    control = {"x-guestd-control": "secret"}
    assert agent.post("/init", json={}, headers=control).status_code == 204
    reports = []

    with terminal(agent) as shell:
        shell.read_until("ready> ")

        def messages():
            yield envelope({"start": of(shell.pid)})
            time.sleep(1.2)
            reports.append(call(agent, "activity.v1.Activity/Get", headers=control).json())
            yield envelope({"data": {"input": {"pty": b64("echo $((1+1))\n")}}})
            shell.read_until(r"\b2\r")
            reports.append(call(agent, "activity.v1.Activity/Get", headers=control).json())

        headers = {"Content-Type": "application/connect+json"}
        agent.post("/process.Process/StreamInput", content=messages(), headers=headers)
    quiet, busy = reports
    assert quiet.get("counting", 0) == 0, quiet
    assert int(quiet["idleForMs"]) >= 1000, quiet
    assert int(busy.get("idleForMs", 0)) < 1000, busy


def test_a_late_client_is_told_how_a_terminal_ended(agent):
    ran = start(agent, "/bin/bash", "-c", "exit 9", pty={"size": SIZE}, tag="term")
    late = connect(agent, tag="term")
    assert (late.pid, late.exit_code, late.pty) == (ran.pid, 9, b"")
