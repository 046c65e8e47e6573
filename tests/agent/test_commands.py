"""What a command does to its streams, its exit and its neighbours."""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.connect import Stream, call, connect, open_stream, process, start
from harness.guestd import Guestd
from harness.processes import alive, wait_until


def shell(script: str, **config) -> dict:
    return {"process": process("/bin/bash", "-c", script, **config)}


def signal(agent, pid: int, name: str):
    return call(agent, "process.Process/SendSignal", {"process": {"pid": pid}, "signal": name})


def listed(agent) -> list[dict]:
    return call(agent, "process.Process/List").json().get("processes", [])


def test_events_come_in_order_and_nothing_follows_the_end(agent):
    ran = start(agent, "/bin/bash", "-c", "echo out; echo err >&2; exit 3")
    assert (ran.order[0], ran.order[-2], ran.order[-1]) == ("start", "end", "end frame")
    assert (ran.stdout, ran.stderr) == (b"out\n", b"err\n")
    assert ran.end.pop("record")["exitCode"] == 3
    assert ran.end == {"exitCode": 3, "exited": True, "status": "exit status 3", "error": "exit status 3"}


def test_success_leaves_the_default_values_out(agent):
    end = start(agent, "/bin/true").end
    assert end.pop("record")["cause"] == "exited"
    assert end == {"exited": True, "status": "exit status 0"}


def test_a_signal_is_told_in_gos_words(agent):
    ran = start(agent, "/bin/bash", "-c", "kill -KILL $$")
    assert ran.exit_code == -1
    assert not ran.end.get("exited", False)
    assert ran.end["status"] == ran.end["error"] == "signal: killed"


def test_a_missing_program_exits_127_as_a_shell_says_it(agent):
    ran = start(agent, "/no/such/program")
    assert ran.order[0] == "start"
    assert ran.exit_code == 127


PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "asked",
    [
        {"args": ["-c", "x" * (32 * PAGE)]},
        {"args": [":"], "envs": {"BIG": "x" * (32 * PAGE)}},
        {"args": ["x" * 1000] * 9000},
    ],
    ids=["one argument", "one variable", "all together"],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_command_that_is_too_long_for_the_kernel_is_refused_and_not_denied(agent, asked, terminal):
    args, envs = asked["args"], asked.get("envs", {})
    ran = start(agent, "/bin/sh", *args, envs=envs, **({"pty": {}} if terminal else {}))
    assert ran.order == ["end frame"]
    assert ran.error["code"] == "invalid_argument"
    message = ran.error["message"]
    assert message.startswith("error starting pty with command '/bin/sh " if terminal else "error starting process '/bin/sh ")
    assert message.endswith("': argument list too long")
    assert len(message) < 1200, "what a client sent is not sent back whole"


def test_a_start_without_a_process_to_spare_is_exhaustion_and_no_end():
    """The limit is the user's: the kernel tells of it at the exec."""
    agent = Guestd(wrapper=["prlimit", "--nproc=0:0"]).start()
    request = {"cwd": "/", "headers": {"Authorization": "Basic Z2FtZXM6"}}
    message = {"process": process("/bin/sleep", "100", cwd="/"), "tag": "first"}
    try:
        with agent.client() as client, open_stream(client, "process.Process/Start", message, request["headers"]) as first:
            pid = Stream(first).until("start")["pid"]
            ran = start(client, "/bin/true", **request)
            assert ran.error["code"] == "resource_exhausted"
            assert ran.error["message"] == "error starting process '/bin/true': resource temporarily unavailable"
            signal(client, pid, "SIGNAL_SIGKILL")
            assert start(client, "/bin/true", **request).exit_code == 0
    finally:
        agent.close()


def test_a_file_that_cannot_be_run_exits_126_with_the_systems_words(agent, tmp_path):
    busy = tmp_path / "busy"
    busy.write_bytes(Path("/bin/true").read_bytes())
    busy.chmod(0o755)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    plain = tmp_path / "plain"
    plain.touch(0o644)
    endless = "/" + "a" * 300
    with busy.open("r+b"):
        for program, words in [
            (str(busy), "Text file busy"),
            (str(loop), "Too many levels of symbolic links"),
            (endless, "File name too long"),
            (str(plain), "Permission denied"),
            (str(tmp_path), "Permission denied"),
        ]:
            ran = start(agent, program)
            assert (ran.order[0], ran.exit_code) == ("start", 126), program
            assert ran.stderr.decode() == f"{program}: {words}\n"


def test_a_name_that_no_pipe_holds_is_not_found_and_does_not_hang(agent):
    ran = start(agent, "x" * 100_000, envs={"PATH": ""}, cwd="/")
    assert ran.exit_code in (126, 127)
    assert len(ran.stderr) < 1200


def test_a_grandchild_that_keeps_stdout_does_not_hold_the_stream_open(agent):
    began = time.monotonic()
    ran = start(agent, "/bin/bash", "-c", "sleep 20 & echo started")
    assert time.monotonic() - began < 10
    assert ran.stdout == b"started\n"
    assert ran.exit_code == 0


def test_last_words_after_sigterm_are_not_lost(agent):
    script = "trap 'for n in $(seq 1000); do echo bye; done; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    with open_stream(agent, "process.Process/Start", shell(script)) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        assert signal(agent, pid, "SIGNAL_SIGTERM").status_code == 200
        ran = stream.rest()
    assert ran.stdout == b"ready\n" + 1000 * b"bye\n"
    assert ran.exit_code == 7


def test_after_a_kill_the_pid_is_gone_at_once(agent):
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/sleep", "100")}) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        assert signal(agent, pid, "SIGNAL_SIGKILL").status_code == 200
        assert start(agent, "/bin/bash", "-c", f"kill -0 {pid}").exit_code != 0
        assert stream.rest().end["status"] == "signal: killed"
    assert pid not in [found["pid"] for found in listed(agent)]


def test_a_signal_to_nobody_is_not_found(agent):
    answer = signal(agent, 4_000_000, "SIGNAL_SIGKILL")
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


def test_a_deadline_ends_the_stream_and_kills_the_command(agent):
    began = time.monotonic()
    ran = start(agent, "/bin/sleep", "100", headers={"Connect-Timeout-Ms": "500"})
    assert 0.4 < time.monotonic() - began < 5
    assert ran.error["code"] == "deadline_exceeded"
    wait_until(lambda: not alive(ran.pid), within=5, what="the command is dead")


def test_a_deadline_kills_even_when_the_client_went_first(agent):
    headers = {"Connect-Timeout-Ms": "1500"}
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/sleep", "100")}, headers) as response:
        pid = Stream(response).until("start")["pid"]
    assert alive(pid)
    wait_until(lambda: not alive(pid), within=6, what="the command is dead")


def test_a_client_that_goes_does_not_kill_the_command(agent):
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/sleep", "100")}) as response:
        pid = Stream(response).until("start")["pid"]
    time.sleep(0.5)
    assert alive(pid)
    signal(agent, pid, "SIGNAL_SIGKILL")


def test_a_malformed_deadline_is_an_invalid_argument_and_runs_nothing(agent, tmp_path):
    message = {"process": process("/usr/bin/touch", str(tmp_path / "ran"))}
    with open_stream(agent, "process.Process/Start", message, {"Connect-Timeout-Ms": "soon"}) as response:
        assert b"invalid_argument" in response.read()
    assert not (tmp_path / "ran").exists()


def test_a_quiet_stream_is_kept_alive_at_the_asked_interval(agent):
    ran = start(agent, "/bin/sleep", "3.5", headers={"Keepalive-Ping-Interval": "1"})
    assert 2 <= ran.keepalives <= 4


@pytest.mark.parametrize("interval", ["0", "-1", "often"])
def test_a_nonsense_keepalive_interval_is_the_default(agent, interval):
    ran = start(agent, "/bin/sleep", "0.3", headers={"Keepalive-Ping-Interval": interval})
    assert (ran.exit_code, ran.keepalives) == (0, 0)


@pytest.mark.takes(33)
def test_an_exit_is_kept_for_30_seconds_for_who_asks_late(agent):
    ran = start(agent, "/bin/bash", "-c", "echo gone; exit 5", tag="late")
    ended = time.monotonic()
    for selector in ({"pid": ran.pid}, {"tag": "late"}):
        late = connect(agent, **selector)
        assert late.order == ["start", "end", "end frame"]
        assert (late.pid, late.exit_code) == (ran.pid, 5)
    time.sleep(ended + 32 - time.monotonic())
    assert connect(agent, pid=ran.pid).error["code"] == "not_found"
    assert connect(agent, tag="late").error["code"] == "not_found"


def test_each_of_many_tags_finds_its_own_process(agent):
    """envd stops its search at the first process that has another tag."""
    pids = {}
    for n in range(8):
        message = {"process": process("/bin/sleep", "100"), "tag": f"tag-{n}"}
        with open_stream(agent, "process.Process/Start", message) as response:
            pids[f"tag-{n}"] = Stream(response).until("start")["pid"]
    assert {found["tag"]: found["pid"] for found in listed(agent)} == pids
    for tag, pid in pids.items():
        with open_stream(agent, "process.Process/Connect", {"process": {"tag": tag}}) as response:
            assert Stream(response).until("start")["pid"] == pid
        signal(agent, pid, "SIGNAL_SIGKILL")


def test_two_readers_each_get_everything(agent):
    with open_stream(agent, "process.Process/Start", shell("sleep 0.5; seq 1000")) as response:
        first = Stream(response)
        pid = first.until("start")["pid"]
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(connect, agent, pid=pid)
            ran = first.rest()
            assert second.result(timeout=10).stdout == ran.stdout == "".join(f"{n}\n" for n in range(1, 1001)).encode()


def test_a_large_output_arrives_whole(agent):
    ran = start(agent, "/bin/bash", "-c", "head -c 20000000 /dev/zero | tr '\\0' x; echo >&2 done")
    assert len(ran.stdout) == 20_000_000
    assert ran.stdout.count(b"x") == 20_000_000
    assert ran.stderr == b"done\n"


def test_stdin_is_fed_and_closed(agent):
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/cat"), "stdin": True}) as response:
        stream = Stream(response)
        selector = {"process": {"pid": stream.until("start")["pid"]}}
        for _ in range(3):
            answer = call(agent, "process.Process/SendInput", {**selector, "input": {"stdin": "aGkK"}})
            assert answer.status_code == 200, answer.text
        assert call(agent, "process.Process/CloseStdin", selector).status_code == 200
        assert stream.rest().stdout == 3 * b"hi\n"


def test_without_stdin_a_reader_sees_the_end_at_once(agent):
    assert start(agent, "/bin/bash", "-c", "read line", stdin=False).exit_code == 1


def test_the_request_decides_cwd_and_environment(agent, tmp_path):
    assert agent.post("/init", json={"envVars": {"A": "global", "B": "global"}}).status_code == 204
    ran = start(agent, "/bin/bash", "-c", 'echo "$PWD $A $B $HOME"', cwd=str(tmp_path), envs={"A": "own"})
    assert ran.stdout.decode() == f"{tmp_path} own global /root\n"


def test_a_command_runs_as_the_named_user(agent):
    ran = start(agent, "/usr/bin/id", "-un", cwd="/", headers={"Authorization": "Basic bm9ib2R5Og=="})
    assert ran.stdout == b"nobody\n"


def test_an_unknown_user_is_unauthenticated_everywhere(agent):
    headers = {"Authorization": "Basic bm9zdWNodXNlcjo="}
    answer = call(agent, "process.Process/List", headers=headers)
    assert answer.status_code == 401
    assert "nosuchuser" in answer.text


def test_a_command_does_not_hold_descriptors_of_the_agent(agent):
    ran = start(agent, "/bin/ls", "/proc/self/fd", stdin=False)
    assert ran.stdout.split() == [b"0", b"1", b"2", b"3"], "three standard streams and the listing's own"


def test_every_child_is_reaped(guestd, agent):
    for _ in range(20):
        start(agent, "/bin/bash", "-c", "true & true")
    time.sleep(0.5)
    children = os.popen(f"ps -o stat= --ppid {guestd.process.pid}").read().split()
    assert not [state for state in children if state.startswith("Z")]


def test_a_start_does_not_wait_for_delayed_acknowledgements(agent):
    """Without TCP_NODELAY each of these takes 40 ms. The fastest quarter, so that a busy machine does not decide."""
    took = []
    for _ in range(50):
        began = time.perf_counter()
        assert start(agent, "/bin/true", stdin=False).exit_code == 0
        took.append(time.perf_counter() - began)
    quarter = statistics.quantiles(took)[0]
    assert quarter < 0.020, f"{quarter * 1000:.1f} ms each"
