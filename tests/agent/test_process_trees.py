"""What a command started: how it ends with the command, what outlives it, and what the end says of all of it.

Each hazard is tried with control groups and, where the kernel has none to give, with process groups.
"""

import gzip
import json
import os
import time
import uuid
from pathlib import Path

import pytest

from harness import processes
from harness.connect import Ran, Stream, call, connect, open_stream, process, start
from harness.guestd import Guestd
from harness.processes import alive, wait_until


def cgroup_mount() -> Path | None:
    """Where groups can be made, of version 2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(",") and os.access(target, os.W_OK):
            return Path(target)
    return None


class Host:
    """guestd alone, and the hierarchy that it was given."""

    def __init__(self, root: Path | None):
        self.root = root
        self.guestd = Guestd(*(["--cgroup-root", str(root)] if root else ["--no-cgroups"])).start()
        self.client = self.guestd.client()

    def groups(self, kind: str = "user") -> list[Path]:
        return [path for path in (self.root / kind).iterdir() if path.is_dir()]

    def close(self):
        self.client.close()
        self.guestd.close()
        if self.root is None:
            return
        for group in [*self.groups(), *self.groups("ptys")]:
            (group / "cgroup.kill").write_text("1")
        for kind in ("user", "ptys"):
            wait_until(lambda kind=kind: not self._leftovers(kind), within=5, what="the groups are empty")
            (self.root / kind).rmdir()
        self.root.rmdir()

    def _leftovers(self, kind: str) -> list[Path]:
        for group in self.groups(kind):
            try:
                group.rmdir()
            except OSError:
                pass
        return self.groups(kind)


def _host(groups: bool):
    if os.geteuid() != 0:
        pytest.skip("no process tree was tested: the agent needs root")
    mount = cgroup_mount()
    if groups and mount is None:
        pytest.skip("control groups were not tested: no cgroup v2 file system can be written to")
    host = Host(mount / f"guestd-test-{uuid.uuid4().hex[:8]}" if groups else None)
    yield host
    host.close()


@pytest.fixture
def grouped():
    yield from _host(True)


@pytest.fixture(params=["control groups", "process groups"])
def host(request):
    yield from _host(request.param == "control groups")


@pytest.fixture
def agent(host):
    return host.client


def shell(script: str, **request) -> dict:
    return {"process": process("/bin/bash", "-c", script), **request}


def signal(agent, pid: int, name: str):
    answer = call(agent, "process.Process/SendSignal", {"process": {"pid": pid}, "signal": name})
    assert answer.status_code == 200, answer.text


class Tree:
    """A command that told the numbers of what it started."""

    def __init__(self, agent, script: str, count: int, headers: dict | None = None, **request):
        self.context = open_stream(agent, "process.Process/Start", shell(script, **request), headers)
        self.script, self.count = script, count

    def __enter__(self):
        self.stream = Stream(self.context.__enter__())
        self.pid = self.stream.until("start")["pid"]
        while len(self.stream.ran.stdout.split()) < self.count:
            self.stream.until("data")
        self.started = [int(pid) for pid in self.stream.ran.stdout.split()]
        assert all(map(alive, self.started))
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)
        for pid in self.started:
            if alive(pid):
                processes.end(pid)


# A child, and a grandchild whose parent is gone.
FAMILY = "sleep 300 & echo $!; (sleep 300 & echo $!); wait"
# In a session of its own: no process group reaches it.
RUNAWAY = "setsid sleep 300 & sleep 0.2; pgrep -P $$ sleep; wait"


def test_grandchildren_end_with_a_kill(agent):
    with Tree(agent, FAMILY, 2) as tree:
        signal(agent, tree.pid, "SIGNAL_SIGKILL")
        assert not alive(tree.pid), "gone when the call returns"
        wait_until(lambda: not any(map(alive, tree.started)), within=2, what="the whole tree is gone")
        end = tree.stream.rest().end
        assert (end["status"], end["record"]["cause"]) == ("signal: killed", "killed")
        assert end["record"]["killedBy"] == "SendSignal SIGKILL by root"
        assert end["record"]["signal"] == 9


def test_grandchildren_end_with_a_timeout(agent):
    with Tree(agent, FAMILY, 2, headers={"Connect-Timeout-Ms": "1000"}, tag="late") as tree:
        assert tree.stream.rest().error["code"] == "deadline_exceeded"
        wait_until(lambda: not any(map(alive, tree.started)), within=2, what="the whole tree is gone")
    record = connect(agent, tag="late").end["record"]
    assert (record["cause"], record["timedOut"], record["killedBy"]) == ("timeout", True, "timeout")


def test_a_request_to_end_is_the_leaders_first(agent):
    """What it started is its own to look after, for as long as it is there."""
    script = """
        trap 'echo asked; wait $child; echo child=$?; exit 0' TERM
        (trap 'echo disturbed; exit 9' TERM; sleep 0.3; echo ready; for n in 1 2 3 4 5; do sleep 0.1; done; echo done; exit 5) &
        child=$!
        wait $child
    """
    with open_stream(agent, "process.Process/Start", shell(script)) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        signal(agent, pid, "SIGNAL_SIGTERM")
        ran = stream.rest()
    assert ran.stdout.split() == [b"ready", b"asked", b"done", b"child=5"]
    assert (ran.exit_code, ran.end["record"]["cause"]) == (0, "exited")


def test_grandchildren_are_asked_when_their_leader_has_ended(agent, tmp_path):
    told = tmp_path / "told"
    last_words = f"(trap 'echo asked >> {told}; exit' TERM; echo $BASHPID; while :; do sleep 0.05; done) & sleep 300 & echo $!; wait"
    with Tree(agent, last_words, 2) as tree:
        signal(agent, tree.pid, "SIGNAL_SIGTERM")
        wait_until(lambda: not any(map(alive, tree.started)), within=2, what="the whole tree is gone")
        assert told.read_text() == "asked\n", "once"
        end = tree.stream.rest().end
        assert (end["status"], end["record"]["cause"]) == ("signal: terminated", "killed")


def test_what_left_its_session_is_asked_when_its_leader_has_ended(grouped):
    with Tree(grouped.client, RUNAWAY, 1) as tree:
        signal(grouped.client, tree.pid, "SIGNAL_SIGTERM")
        wait_until(lambda: not alive(tree.started[0]), within=2, what="the runaway is gone")


def test_a_leader_that_ends_by_itself_leaves_what_it_started_alone(agent):
    ran = start(agent, "/bin/bash", "-c", "sleep 300 > /dev/null 2>&1 & echo $!")
    job = int(ran.stdout)
    time.sleep(0.2)
    assert alive(job)
    processes.end(job)


def test_the_jobs_of_a_terminal_are_asked_in_order(grouped, tmp_path):
    """The one that has the keyboard with the shell, those in the background after it."""
    script = f"""
        set -m
        (trap 'echo background >> {tmp_path}/told; exit' TERM; while :; do sleep 0.05; done) &
        trap 'sleep 0.3; echo shell >> {tmp_path}/told; exit 4' TERM
        (trap 'echo keyboard >> {tmp_path}/told; exit' TERM; echo ready; while :; do sleep 0.05; done)
        sleep 1
    """
    with open_stream(grouped.client, "process.Process/Start", shell(script, pty={})) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        while b"ready" not in stream.ran.pty:
            stream.until("data")
        signal(grouped.client, pid, "SIGNAL_SIGTERM")
        assert stream.rest().exit_code == 4
    told = tmp_path / "told"
    wait_until(lambda: told.read_text() == "keyboard\nshell\nbackground\n", within=5, what="both were asked")


def test_what_left_its_session_ends_with_a_kill(grouped):
    with Tree(grouped.client, RUNAWAY, 1) as tree:
        signal(grouped.client, tree.pid, "SIGNAL_SIGKILL")
        wait_until(lambda: not alive(tree.started[0]), within=2, what="the runaway is gone")


def test_a_background_job_of_a_finished_command_lives_on_and_may_write(host, agent, tmp_path):
    """In the end its output goes nowhere, and it must be killed neither by that nor by a full pipe."""
    script = f"(for n in $(seq 30); do head -c 9000 /dev/zero; sleep 0.02; done; echo done > {tmp_path}/done) & exit 0"
    ran = start(agent, "/bin/bash", "-c", script)
    assert ran.exit_code == 0
    assert ran.end["record"]["outputTruncated"] is True
    wait_until((tmp_path / "done").exists, within=10, what="the job wrote all that it had")


def test_the_group_of_a_background_job_goes_when_the_job_does(grouped):
    ran = start(grouped.client, "/bin/bash", "-c", "sleep 300 > /dev/null 2>&1 & echo $!")
    job = int(ran.stdout)
    assert alive(job)
    [group] = grouped.groups()
    assert (group / "cgroup.procs").read_text().split() == [str(job)]
    processes.end(job)
    wait_until(lambda: not grouped.groups(), within=5, what="the empty group is removed")


def test_no_group_outlives_its_command(grouped):
    for n in range(50):
        start(grouped.client, "/bin/true", **({"pty": {}} if n % 2 else {}))
    wait_until(lambda: not grouped.groups() + grouped.groups("ptys"), within=2, what="all groups are removed")


def test_a_command_is_in_its_group_from_its_first_instruction(grouped):
    ran = start(grouped.client, "/bin/cat", "/proc/self/cgroup")
    assert f"/{grouped.root.name}/user/c-" in ran.stdout.decode()
    ran = start(grouped.client, "/bin/cat", "/proc/self/cgroup", pty={})
    assert f"/{grouped.root.name}/ptys/c-" in ran.pty.decode()


def test_a_system_command_stays_where_the_agent_is(grouped):
    own = Path(f"/proc/{grouped.guestd.process.pid}/cgroup").read_bytes()
    assert start(grouped.client, "/bin/cat", "/proc/self/cgroup", tag="_system").stdout == own


def test_a_frozen_group_makes_a_start_unavailable_and_not_hang(grouped):
    freeze = grouped.root / "user/cgroup.freeze"
    freeze.write_text("1")
    try:
        began = time.monotonic()
        ran = start(grouped.client, "/bin/true")
        assert ran.error["code"] == "unavailable"
        assert time.monotonic() - began < 1
    finally:
        freeze.write_text("0")
    assert start(grouped.client, "/bin/true").exit_code == 0


@pytest.mark.parametrize(
    ("limits", "field"),
    [({"memoryBytes": "0"}, "limits.memory_bytes"), ({"cpuPercent": 0}, "limits.cpu_percent"), ({"pids": 0}, "limits.pids")],
)
def test_a_limit_that_makes_no_sense_is_refused_by_name(agent, limits, field):
    ran = start(agent, "/bin/true", limits=limits)
    assert ran.error["code"] == "invalid_argument"
    assert ran.error["message"].startswith(f"{field}: must be from ")


def test_a_limit_that_cannot_be_kept_is_refused(host, agent):
    controllers = (host.root / "cgroup.controllers").read_text().split() if host.root else []
    if "memory" in controllers:
        pytest.skip("this machine can keep a memory limit")
    ran = start(agent, "/bin/true", limits={"memoryBytes": str(64 << 20)})
    assert ran.error["code"] == "failed_precondition"
    assert "the memory limit cannot be kept here" in ran.error["message"]
    defaults = {"processLimits": {"memoryBytes": 64 << 20}}
    assert agent.post("/init", json=defaults).status_code == 204
    assert start(agent, "/bin/true").exit_code == 0, "a default is only a wish"


def test_nonsense_default_limits_are_a_bad_request(agent):
    answer = agent.post("/init", json={"processLimits": {"cpuPercent": 0}})
    assert answer.status_code == 400
    assert "processLimits.cpuPercent: must be from 1 to 100000" in answer.text


def test_an_exit_is_told_within_100_ms_while_a_grandchild_holds_the_pipe(agent):
    # The child is a shell until it has become the sleeper.
    script = "sleep 100 & echo $!; until grep -q sleep /proc/$!/comm; do :; done; exec date +%s.%N"
    took = []
    for _ in range(5):
        with open_stream(agent, "process.Process/Start", shell(script)) as response:
            stream = Stream(response)
            ran = stream.rest()
            seen = time.time()
        sleeper, exited = ran.stdout.split()
        processes.end(int(sleeper))
        took.append(seen - float(exited))
        assert ran.exit_code == 0
        assert ran.end["record"]["outputHeldBy"] == [{"pid": int(sleeper), "name": "sleep"}]
        assert ran.end["record"]["outputTruncated"] is True
    assert min(took) < 0.100, took


def test_a_grandchild_that_floods_the_pipe_does_not_delay_the_end(agent):
    began = time.monotonic()
    ran = start(agent, "/bin/bash", "-c", "yes & echo $! >&2; sleep 0.1; exit 3")
    processes.end(int(ran.stderr))
    assert ran.exit_code == 3
    assert time.monotonic() - began < 15, "it would flood for ever"


@pytest.mark.parametrize("terminal", [False, True])
def test_last_words_after_sigterm_arrive(agent, terminal):
    script = "trap 'seq 5000; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    request = {"pty": {}} if terminal else {}
    with open_stream(agent, "process.Process/Start", shell(script, **request)) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        signal(agent, pid, "SIGNAL_SIGTERM")
        ran = stream.rest()
    said = (ran.pty if terminal else ran.stdout).split()
    # On a terminal bash also says what became of its sleep.
    said = [word for word in said if word != b"Terminated"]
    assert said == [b"ready"] + [b"%d" % n for n in range(1, 5001)], "all, and once"
    assert (ran.exit_code, ran.end["record"]["cause"]) == (7, "exited")


def test_what_is_in_the_pipe_at_a_kill_arrives(agent):
    with open_stream(agent, "process.Process/Start", shell("head -c 60000 /dev/zero; echo full >&2; sleep 100")) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        while stream.ran.stderr != b"full\n":
            stream.until("data")
        signal(agent, pid, "SIGNAL_SIGKILL")
        assert len(stream.rest().stdout) == 60000


def test_a_signal_is_delivered_once(agent):
    script = "trap 'echo caught' TERM; echo ready; for n in 1 2 3 4 5 6 7 8; do sleep 0.1; done"
    with open_stream(agent, "process.Process/Start", shell(script)) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        signal(agent, pid, "SIGNAL_SIGTERM")
        assert stream.rest().stdout.count(b"caught") == 1


def test_the_record_counts_and_measures(agent):
    memory = "head -c 300000000 /dev/zero | tail -c 300000000 > /dev/null"
    script = f"head -c 70000 /dev/zero; head -c 5 /dev/zero >&2; i=0; while ((i++ < 100000)); do :; done; {memory}; sleep 0.2"
    record = start(agent, "/bin/bash", "-c", script).end["record"]
    assert (record["stdoutBytes"], record["stderrBytes"]) == ("70000", "5")
    assert record["cause"] == "exited"
    assert int(record["userCpuUs"]) > 10_000
    assert 300_000_000 < int(record["peakMemoryBytes"]) < 400_000_000
    assert 200 <= int(record["durationMs"]) < 10_000
    assert "killedBy" not in record and "outputTruncated" not in record and "oomKilled" not in record


def test_the_agents_own_memory_is_not_told_as_a_commands():
    """Without a group that counts memory, a child begins with what the agent had at most."""
    guestd = Guestd("--no-cgroups").start()
    try:
        with guestd.client() as client:
            body = gzip.compress(b'{"a":"' + b" " * 60_000_000 + b'"}', 1)
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            assert client.post("/process.Process/List", content=body, headers=headers).status_code == 200
            record = start(client, "/bin/true").end["record"]
            assert "peakMemoryBytes" not in record, "not known"
    finally:
        guestd.close()


def test_a_crash_is_no_kill(agent):
    record = start(agent, "/bin/bash", "-c", "ulimit -c 0; kill -SEGV $$").end["record"]
    assert (record["cause"], record["signal"], record["exitCode"]) == ("signalled", 11, -1)


def test_a_writer_that_is_stuck_holds_up_neither_the_closing_nor_the_end(agent):
    with open_stream(agent, "process.Process/Start", shell("echo up; exec sleep 100")) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        of = {"process": {"pid": pid}}
        stream.until("data")
        began = time.monotonic()
        big = {**of, "input": {"stdin": "eHh4" * 100_000}}
        answer = call(agent, "process.Process/SendInput", big, headers={"Connect-Timeout-Ms": "500"})
        assert answer.json()["code"] == "deadline_exceeded"
        assert "took 65536 of 300000 bytes" in answer.json()["message"]
        assert call(agent, "process.Process/CloseStdin", of).status_code == 200
        answer = call(agent, "process.Process/SendInput", {**of, "input": {"stdin": "eA=="}})
        assert answer.json() == {
            "code": "internal",
            "message": "error writing to stdin: stdin not enabled or closed",
        }
        assert call(agent, "process.Process/CloseStdin", of).status_code == 200, "closing twice is fine"
        signal(agent, pid, "SIGNAL_SIGKILL")
        stream.rest()
        assert time.monotonic() - began < 5


def test_a_reader_that_is_gone_is_a_broken_pipe(agent):
    with open_stream(agent, "process.Process/Start", shell("exec <&-; echo up; sleep 100")) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        stream.until("data")
        answer = call(agent, "process.Process/SendInput", {"process": {"pid": pid}, "input": {"stdin": "eA=="}})
        assert answer.json()["code"] == "internal"
        assert "broken pipe" in answer.json()["message"].lower()
        signal(agent, pid, "SIGNAL_SIGKILL")


def test_the_catalogue_of_refusals(agent):
    def refused(method: str, message: dict) -> tuple[str, str]:
        body = call(agent, f"process.Process/{method}", message).json()
        return body["code"], body["message"]

    gone = {"process": {"pid": 4_000_000}}
    for method in ("Update", "CloseStdin"):
        assert refused(method, gone) == ("not_found", "process with pid 4000000 not found")
    assert refused("SendInput", {**gone, "input": {"stdin": "eA=="}})[0] == "not_found"
    assert refused("SendSignal", {"process": {"tag": "none"}, "signal": 9}) == (
        "not_found",
        "process with tag none not found",
    )
    assert refused("SendSignal", gone)[0] == "unimplemented"
    assert refused("CloseStdin", {})[0] == "unimplemented"
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/cat"), "tag": "cat"}) as response:
        pid = Stream(response).until("start")["pid"]
        assert refused("SendInput", {"process": {"tag": "cat"}})[0] == "unimplemented"
        signal(agent, pid, "SIGNAL_SIGKILL")


def test_a_refusal_repeats_no_more_than_the_beginning_of_a_text(agent):
    long = "t" * 100_000
    answer = call(agent, "process.Process/SendSignal", {"process": {"tag": long}, "signal": 9}).json()
    assert answer == {"code": "not_found", "message": f"process with tag {long[:1024]}… not found"}
    refused = start(agent, "/bin/true", cwd=f"/{long}").error
    assert refused["code"] == "invalid_argument" and len(refused["message"]) < 1200
    refused = start(agent, "/bin/true", envs={f"{long}=": "x"}).error
    assert refused["code"] == "invalid_argument" and len(refused["message"]) < 1200


def test_a_working_directory_that_the_user_may_not_enter_is_a_start_error(agent, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    ran: Ran = start(agent, "/bin/true", cwd=str(closed), headers={"Authorization": "Basic bm9ib2R5Og=="})
    assert ran.error["code"] == "invalid_argument"
    assert ran.error["message"].startswith("error starting process '/bin/true': ")
    assert json.dumps(ran.order) == '["end frame"]'


@pytest.mark.vms(1)
@pytest.mark.takes(25)
def test_a_machine_keeps_limits_and_names_the_end_for_want_of_memory(machines):
    """Only a machine of its own has all controllers for certain."""
    with machines.plane(machines.create()) as client:
        limits = {"memoryBytes": str(48 << 20), "cpuPercent": 50, "pids": 20}
        script = 'cd /sys/fs/cgroup/$(cut -d: -f3 /proc/self/cgroup) && cat memory.max cpu.max pids.max && pwd'
        shown = start(client, "/bin/bash", "-c", script, limits=limits).stdout.decode().split("\n")
        assert shown[:3] == [str(48 << 20), "50000 100000", "20"]
        assert shown[3].startswith("/sys/fs/cgroup/user/c-")

        record = start(client, "/usr/bin/tail", "/dev/zero", limits=limits).end["record"]
        assert (record["cause"], record["oomKilled"], record["signal"]) == ("oom", True, 9)
        assert record["killedBy"] == "the kernel: out of memory"
        assert 40 << 20 <= int(record["peakMemoryBytes"]) <= 48 << 20

        ended = start(client, "/bin/bash", "-c", "tail /dev/zero; exit $?", limits=limits).end
        assert (ended["exitCode"], ended["record"]["cause"], ended["record"]["oomKilled"]) == (137, "exited", True)

        free = start(client, "/bin/cat", "/proc/self/cgroup", pty={}).pty.decode()
        assert free.startswith("0::/ptys/c-")
