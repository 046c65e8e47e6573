"""POST /upgrade: another program takes the agent's place, and nothing that runs notices."""

import base64
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import httpx
import pytest

from harness import locations, processes
from harness.connect import Ran, Stream, call, envelope, open_stream, process, start
from harness.guestd import Guestd

HOST = {"X-Guestd-Control": "host"}
OFFSETS = {"Guestd-Output-Offset": "0"}
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def agent(tmp_path):
    """An agent with a root folder of the test's own for what /upgrade writes."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    agent = Guestd("--root", str(tmp_path)).start()
    agent.root = tmp_path
    initialise(agent)
    yield agent
    agent.close()


def initialise(agent: Guestd) -> httpx.Response:
    with agent.client() as client:
        answer = client.post("/init", headers=HOST, json={})
        assert answer.status_code == 204, answer.text
        return answer


def send(agent: Guestd, **options) -> httpx.Response | None:
    """The answer of a refused upgrade; None when the connection was dropped, which is success."""
    headers = {**HOST, **options.pop("headers", {})}
    with agent.client() as client:
        try:
            return client.post("/upgrade", headers=headers, **options)
        except httpx.RemoteProtocolError:
            return None


def upgrade(agent: Guestd, **options) -> dict:
    """Replaces the agent and initialises the new one; what that says it took over."""
    pid = agent.process.pid
    refused = send(agent, **options)
    assert refused is None, f"{refused.status_code}: {refused.text}"
    assert agent.process.poll() is None and agent.process.pid == pid
    return json.loads(initialise(agent).headers["x-envd-handover"])


def connect(client: httpx.Client, pid: int, offset: int | None = None) -> Ran:
    message = {"process": {"pid": pid}}
    if offset is not None:
        message["fromOffset"] = str(offset)
    with open_stream(client, "process.Process/Connect", message) as response:
        assert response.status_code == 200, response.read()
        return Stream(response).rest()


def begin(agent: Guestd, script: str, **request) -> int:
    """Starts a command and goes away."""
    with agent.client() as client:
        message = {"process": process("/bin/sh", "-c", script), **request}
        with open_stream(client, "process.Process/Start", message) as response:
            assert response.status_code == 200, response.read()
            return Stream(response).until("start")["pid"]


def listed(agent: Guestd) -> list[dict]:
    with agent.client() as client:
        return call(client, "process.Process/List").json().get("processes", [])


def descriptors(agent: Guestd) -> int:
    return len(os.listdir(f"/proc/{agent.process.pid}/fd"))


def children(agent: Guestd) -> list[str]:
    """The states of the agent's children."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[1] == str(agent.process.pid):
            states.append(fields[0])
    return states


def test_before_the_first_init_there_is_nothing_to_hand_over(guestd):
    with guestd.client() as client:
        answer = client.post("/upgrade", headers=HOST)
        assert (answer.status_code, answer.text) == (409, "envd not initialized")


def test_only_the_host_may_replace_the_agent(agent):
    with agent.client() as client:
        assert client.post("/upgrade").status_code == 401
        assert client.post("/upgrade", headers={"X-Guestd-Control": "guess"}).status_code == 401


def test_a_program_is_put_in_one_place_only(agent):
    answer = send(agent, headers={"X-Envd-Upgrade-Bin": "/usr/bin/other"})
    assert answer.status_code == 400
    assert "/usr/bin/envd.next" in answer.text
    assert upgrade(agent, headers={"X-Envd-Upgrade-Bin": "/usr/bin/envd.next"})["failed"] is False
    assert upgrade(agent, headers={"X-Envd-Upgrade-Bin": ""})["failed"] is False


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("echo one; sleep 1.5; echo two", {"exited": True, "status": "exit status 0"}),
        ("sleep 1.5; exit 7", {"exitCode": 7, "exited": True, "status": "exit status 7", "error": "exit status 7"}),
        ("sleep 1.5; exit 130", {"exitCode": 130, "exited": True, "status": "exit status 130"}),
        ("sleep 1.5; kill -TERM $$", {"exitCode": -1, "status": "signal: terminated", "error": "signal: terminated"}),
        ("sleep 1.5; kill -KILL $$", {"exitCode": -1, "status": "signal: killed"}),
    ],
)
def test_a_command_runs_on_and_its_end_is_exact(agent, script, end):
    pid = begin(agent, script, tag="job")
    before = listed(agent)
    assert upgrade(agent)["procs"] == 1
    assert listed(agent) == before and before[0]["tag"] == "job"
    with agent.client() as client:
        ran = connect(client, pid, offset=0)
    assert {key: ran.end.get(key) for key in end} == end
    assert ran.end["record"]["cause"] == ("exited" if end.get("exited") else "signalled")
    if "echo" in script:
        assert ran.stdout == b"one\ntwo\n"
    assert children(agent) == []


def test_a_command_that_ends_during_the_exec_is_reported(agent):
    pids = [begin(agent, f"sleep 0.{n}; exit {n}") for n in range(10, 60, 5)]
    time.sleep(0.05)
    report = upgrade(agent)
    assert report["procs"] + report["retained"] == len(pids)
    with agent.client() as client:
        codes = [connect(client, pid).exit_code for pid in pids]
    assert codes == list(range(10, 60, 5))
    assert children(agent) == []


def test_input_goes_on_and_can_be_closed(agent):
    pid = begin(agent, "read a; read b; echo $a-$b; cat; exit 4")
    with agent.client() as client:
        for text in (b"first\n", b"second\nthird\n"):
            data = {"stdin": base64.b64encode(text).decode()}
            sent = call(client, "process.Process/SendInput", {"process": {"pid": pid}, "input": data})
            assert sent.status_code == 200, sent.text
            if text == b"first\n":
                upgrade(agent)
        call(client, "process.Process/CloseStdin", {"process": {"pid": pid}})
        ran = connect(client, pid, offset=0)
    assert (ran.stdout, ran.exit_code) == (b"first-second\nthird\n", 4)


def held_up(agent: Guestd, text: bytes) -> tuple[int, threading.Thread, list[httpx.Response]]:
    """A command that reads nothing for a while, and a call that fills its stdin."""
    pid = begin(agent, f"while [ ! -e {agent.root}/go ]; do sleep 0.05; done; sha256sum")
    answers: list[httpx.Response] = []

    def write():
        with agent.client() as client:
            data = {"stdin": base64.b64encode(text).decode()}
            answers.append(call(client, "process.Process/SendInput", {"process": {"pid": pid}, "input": data}))

    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.3)
    assert not answers, "it waits for the command"
    return pid, thread, answers


@pytest.mark.parametrize("times", [1, 2])
def test_input_that_a_full_pipe_holds_up_is_taken_and_arrives_once(agent, times):
    """A client whose call breaks sends it again, and the command would see bytes twice."""
    text = os.urandom(300_000)
    pid, writer, answers = held_up(agent, text)
    for _ in range(times):
        assert upgrade(agent)["failed"] is False
    writer.join(10)
    assert [answer.status_code for answer in answers] == [200]
    with agent.client() as client:
        more = {"process": {"pid": pid}, "input": {"stdin": base64.b64encode(b"more").decode()}}
        newer = threading.Thread(target=call, args=(client, "process.Process/SendInput", more))
        newer.start()
        time.sleep(0.2)
        (agent.root / "go").touch()
        newer.join(10)
        assert call(client, "process.Process/CloseStdin", {"process": {"pid": pid}}).status_code == 200
        ran = connect(client, pid, offset=0)
    assert ran.stdout.split()[0].decode() == hashlib.sha256(text + b"more").hexdigest()


def test_stdin_that_is_closed_after_an_upgrade_ends_behind_what_was_taken(agent):
    text = os.urandom(300_000)
    pid, writer, answers = held_up(agent, text)
    upgrade(agent)
    writer.join(10)
    with agent.client() as client:
        for _ in range(2):
            assert call(client, "process.Process/CloseStdin", {"process": {"pid": pid}}).status_code == 200
        upgrade(agent)
        late = {"process": {"pid": pid}, "input": {"stdin": "eA=="}}
        assert "stdin not enabled or closed" in call(client, "process.Process/SendInput", late).text
        (agent.root / "go").touch()
        ran = connect(client, pid, offset=0)
    assert ran.stdout.split()[0].decode() == hashlib.sha256(text).hexdigest()


def test_a_stream_of_input_is_told_how_much_was_taken(agent):
    pid = begin(agent, f"while [ ! -e {agent.root}/go ]; do sleep 0.05; done; sha256sum")
    text = os.urandom(300_000)
    answers: list[httpx.Response] = []

    def messages():
        yield envelope({"start": {"process": {"pid": pid}}})
        yield envelope({"data": {"input": {"stdin": base64.b64encode(text).decode()}}})
        time.sleep(3)

    def write():
        headers = {"Content-Type": "application/connect+json"}
        with agent.client() as client:
            answers.append(client.post("/process.Process/StreamInput", content=messages(), headers=headers))

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.5)
    upgrade(agent)
    writer.join(10)
    assert b'"code":"unavailable"' in answers[0].content
    assert b"300000 bytes of input were taken" in answers[0].content
    (agent.root / "go").touch()
    with agent.client() as client:
        assert call(client, "process.Process/CloseStdin", {"process": {"pid": pid}}).status_code == 200
        ran = connect(client, pid, offset=0)
    assert ran.stdout.split()[0].decode() == hashlib.sha256(text).hexdigest()


def test_a_terminal_keeps_its_size_and_its_keyboard(agent):
    size = {"size": {"cols": 91, "rows": 37}}
    pid = begin(agent, "stty -echo; read x; stty size; read y; stty size; echo got $x $y", pty=size)
    upgrade(agent)
    with agent.client() as client:

        def type_in(text: bytes) -> None:
            data = {"pty": base64.b64encode(text).decode()}
            sent = call(client, "process.Process/SendInput", {"process": {"pid": pid}, "input": data})
            assert sent.status_code == 200, sent.text

        type_in(b"a\n")
        time.sleep(0.3)
        resized = {"process": {"pid": pid}, "pty": {"size": {"cols": 120, "rows": 40}}}
        assert call(client, "process.Process/Update", resized).status_code == 200
        upgrade(agent)
        type_in(b"b\n")
        ran = connect(client, pid, offset=0)
    assert ran.pty.split() == b"37 91 40 120 got a b".split()
    assert ran.exit_code == 0


def test_a_deadline_goes_on(agent):
    with agent.client() as client:
        message = {"process": process("/bin/sleep", "60")}
        headers = {"Connect-Timeout-Ms": "3000"}
        with open_stream(client, "process.Process/Start", message, headers) as response:
            pid = Stream(response).until("start")["pid"]
    began = time.monotonic()
    upgrade(agent)
    with agent.client() as client:
        ran = connect(client, pid)
    assert ran.end["record"]["cause"] == "timeout"
    assert time.monotonic() - began < 5


def test_the_end_of_a_command_is_kept_for_whoever_comes_late(agent):
    pid = begin(agent, "echo gone; exit 3")
    time.sleep(0.5)
    assert upgrade(agent)["retained"] == 1
    with agent.client() as client:
        ran = connect(client, pid, offset=0)
    assert (ran.stdout, ran.exit_code) == (b"gone\n", 3)


def test_a_job_that_outlives_its_command_can_go_on_writing(agent):
    marker = agent.root / "written"
    begin(agent, f"(sleep 1; for n in 1 2 3; do echo $n; done; echo ok > {marker}) & exit 0")
    time.sleep(0.5)
    upgrade(agent)
    processes.wait_until(marker.exists, within=5, what="the job wrote on after the upgrade")


def test_everybody_but_the_host_is_shut_out_until_the_next_init(agent):
    with agent.client() as client:
        assert client.post("/init", headers=HOST, json={"accessToken": "t", "envVars": {"A": "kept"}}).status_code == 204
    token = {"X-Access-Token": "t"}
    assert send(agent) is None
    with agent.client(headers=token) as client:
        assert client.get("/health").status_code == 204
        for answer in (client.get("/metrics"), call(client, "process.Process/List"), client.post("/freeze", headers=HOST)):
            assert answer.status_code == 401
            assert answer.json()["message"] == "envd not initialized"
        assert client.post("/init", json={"accessToken": "t"}).status_code == 401, "the control credential is kept"
        answer = client.post("/init", headers=HOST, json={"accessToken": "t"})
        assert answer.status_code == 204
        report = json.loads(answer.headers["x-envd-handover"])
        assert report == {
            "failed": False,
            "procs": 0,
            "procs_failed": 0,
            "retained": 0,
            "retained_failed": 0,
            "watchers": 0,
            "watchers_failed": 0,
        }
        assert client.get("/envs").json()["A"] == "kept"
        again = client.post("/init", headers=HOST, json={"accessToken": "t"})
        assert "x-envd-handover" not in again.headers


def test_a_polled_watcher_keeps_what_it_heard_and_hears_on(agent):
    folder = agent.root / "watched"
    folder.mkdir()
    with agent.client() as client:
        made = call(client, "filesystem.Filesystem/CreateWatcher", {"path": str(folder), "recursive": True})
        watcher = made.json()["watcherId"]
        (folder / "before").write_text("x")
    assert upgrade(agent)["watchers"] == 1
    (folder / "after").write_text("x")
    with agent.client() as client:
        events = call(client, "filesystem.Filesystem/GetWatcherEvents", {"watcherId": watcher}).json()["events"]
    names = [event["name"] for event in events]
    assert "before" in names and "after" in names
    assert names.index("before") < names.index("after")


def test_a_new_program_is_taken_from_the_body(agent):
    program = locations.guestd().read_bytes()
    digest = base64.b64encode(hashlib.sha256(program).digest()).decode()
    dropped = agent.root / "usr/bin/envd.next"
    upgrade(agent, content=program, headers={**RAW, "Content-Digest": f"sha-256=:{digest}:"})
    assert os.readlink(f"/proc/{agent.process.pid}/exe") == str(dropped)
    assert dropped.stat().st_mode & 0o777 == 0o755
    # The program that runs is the one that is replaced on disk.
    upgrade(agent, content=program, headers=RAW)
    upgrade(agent)


@pytest.mark.parametrize(
    ("program", "status", "says"),
    [
        (b"#!/bin/sh\nexit 0\n", 400, "no ELF file"),
        (b"\x7fELF" + bytes(100), 400, "no ELF file"),
        (Path("/bin/false").read_bytes(), 500, "--version"),
        (Path("/bin/true").read_bytes(), 500, "version"),
    ],
)
def test_a_broken_program_does_not_get_the_agents_place(agent, program, status, says):
    pid = begin(agent, "sleep 1.5; echo there; exit 5")
    answer = send(agent, content=program, headers=RAW)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text
    with agent.client() as client:
        ran = connect(client, pid, offset=0)
        assert (ran.stdout, ran.exit_code) == (b"there\n", 5)
        assert start(client, "/bin/true").exit_code == 0


def test_a_program_with_another_digest_is_refused(agent):
    program = locations.guestd().read_bytes()
    digest = base64.b64encode(hashlib.sha256(b"another").digest()).decode()
    answer = send(agent, content=program, headers={**RAW, "Content-Digest": f"sha-256=:{digest}:"})
    assert (answer.status_code, "sha-256" in answer.text) == (400, True)
    assert not (agent.root / "usr/bin/envd.next").exists()


@pytest.mark.takes(40)
def test_twenty_upgrades_under_a_flood_lose_no_byte_and_leave_nothing_behind(agent):
    count = 6_000_000
    expected = hashlib.sha256(b"".join(b"%d\n" % n for n in range(1, count + 1))).hexdigest()
    pid = begin(agent, f"sleep 1; seq 1 {count}; exit 9")
    result: dict = {}

    def read() -> None:
        """A client that comes back to where it was."""
        received, end = hashlib.sha256(), None
        offset, breaks = 0, 0
        while end is None:
            with agent.client() as client:
                message = {"process": {"pid": pid}, "fromOffset": str(offset)}
                try:
                    with open_stream(client, "process.Process/Connect", message) as response:
                        if response.status_code == 200:
                            for event in Stream(response):
                                assert "gap" not in event, event
                                if "data" in event:
                                    data = base64.b64decode(event["data"]["stdout"])
                                    received.update(data)
                                    offset += len(data)
                                    # Slow enough to be there for all of them.
                                    time.sleep(len(data) / 4_000_000)
                                end = event.get("end", end)
                        else:
                            response.read()
                except (httpx.TransportError, AssertionError) as error:
                    if "gap" in str(error):
                        result["error"] = error
                        return
            breaks += 1
            if end is None:
                time.sleep(0.01)
        result.update(digest=received.hexdigest(), code=end.get("exitCode"), breaks=breaks)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(1.2)
    upgrade(agent)
    held = descriptors(agent)
    for _ in range(19):
        upgrade(agent)
    # The descriptors of one stream more or less.
    assert abs(descriptors(agent) - held) <= 2
    reader.join(100)
    assert "error" not in result, result
    assert (result["digest"], result["code"]) == (expected, 9)
    assert result["breaks"] > 2
    assert children(agent) == []


def test_callers_who_come_during_an_upgrade_are_not_refused(agent):
    stop, outcomes = threading.Event(), []

    def knock() -> None:
        while not stop.is_set():
            try:
                with agent.client() as client:
                    outcomes.append(client.get("/health").status_code)
            except httpx.ConnectError as error:
                outcomes.append(repr(error))
            except httpx.TransportError:
                # Accepted by the agent before, which closed it.
                pass

    knocking = threading.Thread(target=knock)
    knocking.start()
    for _ in range(3):
        upgrade(agent)
    stop.set()
    knocking.join(10)
    assert set(outcomes) == {204}
