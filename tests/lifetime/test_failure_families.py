"""The four ways in which idleness fails elsewhere, each end to end: the E2B SDK, microVMs, and the shortest idle timeout that users get.

1. Killed while working: a job of three minutes survives, with its client attached, and detached where the sandbox says that such work
   counts.
2. Never stops: what is only open (a terminal, a watch, a WebSocket to a guest port, a client's connection pool) keeps nothing alive.
3. Observed to death, or to life: whoever asks for the state changes nothing.
4. Nobody can tell why: the explanation names what keeps a sandbox alive, and the tombstone what ended it.

Each hazard is a function with a sandbox of its own. They sleep for minutes, so they sleep at the same time, in one hostd; each is a subtest.
"""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2b import AsyncSandbox, PtySize, Sandbox, TimeoutException
from websockets.sync.client import connect

from harness.processes import wait_until
from harness.together import all_at_once
from harness.vm_slots import two_boots

IDLE = 60
JOB = 180
SERVER = (Path(__file__).parents[1] / "api/guest_server.py").read_text()
PORT = 8000
# The last answer's own way from hostd to this process; hostd counted before it.
ON_ITS_WAY = 0.1


def create(machines, **metadata) -> Sandbox:
    with two_boots:
        return Sandbox.create(metadata={"idle_timeout": str(IDLE), **metadata}, **machines.sdk())


def holds(machines, sandbox: Sandbox) -> list[tuple[str, bool]]:
    """Class and whether it counts, of each hold; asking is free."""
    told = machines.explain(sandbox.sandbox_id)
    assert told["state"] == "running", told
    return [(hold["class"], hold["counts"]) for hold in told["holds"]]


def history(told: dict) -> str:
    return " | ".join(line["what"] for line in told["transitions"])


def released(machines, sandbox: Sandbox, last: float, late: float = 1) -> dict:
    """The explanation of a sandbox that was released in time after its last use."""
    at, ended = machines.wait_until_ended(sandbox.sandbox_id, within=IDLE + late + 15)
    assert ended["reason"] == "idle", ended
    assert IDLE - ON_ITS_WAY <= at - last <= IDLE + late, f"released after {at - last:.3f} s: {ended}"
    assert IDLE <= ended["idle_for_s"] <= IDLE + 1, ended
    wait_until(lambda: sandbox.is_running() is False, within=2, what="the SDK is told")
    return machines.explain(sandbox.sandbox_id)


# --- killed while working ---


def a_job_of_three_minutes_with_its_client_attached_is_not_cut(machines):
    sandbox = create(machines)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lambda: (sandbox.commands.run(f"sleep {JOB}; echo done", timeout=0), time.monotonic()))
        time.sleep(JOB - 10)
        assert ("command", True) in holds(machines, sandbox)
        assert machines.explain(sandbox.sandbox_id)["releases_in_s"] is None
        result, last = job.result()
    assert result.stdout == "done\n"
    assert "command" in history(released(machines, sandbox, last))


def a_detached_job_of_three_minutes_is_not_cut_where_such_jobs_count_as_alive(machines):
    sandbox = create(machines, idle_detached="alive")
    began = time.monotonic()
    sandbox.commands.run(f"sleep {JOB}; echo done >/tmp/done", background=True, timeout=0).disconnect()
    started = time.monotonic()
    time.sleep(JOB - 10)
    assert holds(machines, sandbox) == [("detached", True)]
    at, ended = machines.wait_until_ended(sandbox.sandbox_id, within=10 + IDLE + 20)
    assert ended["reason"] == "idle"
    # Its end is use; emulation may take a second or two to start it.
    assert JOB + IDLE - ON_ITS_WAY <= at - began, at - began
    assert at - started <= JOB + IDLE + 4, at - started
    assert "detached" in history(machines.explain(sandbox.sandbox_id))


def a_detached_job_that_computes_for_three_minutes_is_not_cut_under_progress(machines):
    sandbox = create(machines, idle_detached="progress")
    began = time.monotonic()
    # A few hundredths of a processor: more would be taken from the other tests.
    work = "while :; do n=0; while [ $n -lt 3000 ]; do n=$((n+1)); done; sleep 0.5; done"
    job = f"timeout {JOB} sh -c '{work}'; sleep 1000"
    sandbox.commands.run(job, background=True, timeout=0).disconnect()
    started = time.monotonic()
    time.sleep(JOB - 10)
    assert holds(machines, sandbox) == [("detached", True)]
    at, ended = machines.wait_until_ended(sandbox.sandbox_id, within=10 + IDLE + 40)
    assert ended["reason"] == "idle"
    # The sleep after the work is none: a look every two seconds, and ten for which the last movement counts.
    assert JOB + IDLE <= at - began, at - began
    assert at - started <= JOB + IDLE + 2 + 10 + 6, at - started
    assert [hold["class"] for hold in ended["last_holds"]] == ["detached"]
    assert not ended["last_holds"][0]["counts"]


# --- never stops ---


def an_open_terminal_keeps_nothing_alive(machines):
    sandbox = create(machines)
    output = []
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=0)

    def read() -> None:
        # The SDK's word for a stream that ends with its sandbox.
        with pytest.raises(TimeoutException, match="sandbox"):
            for each in terminal:
                output.append(each)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        sandbox.pty.send_stdin(terminal.pid, b"echo $((6*7))\n")
        wait_until(lambda: "42" in str(output), within=20, what="the terminal answers")
        # Its prompt follows the answer.
        time.sleep(1)
        seen = len(output)
        last = time.monotonic() - 1
        assert ("terminal", False) in holds(machines, sandbox)
        told = released(machines, sandbox, last, late=2.1)
        reading.result(timeout=10)
    assert len(output) == seen, "it was not silent"
    assert "terminal" in [hold["class"] for hold in told["ended"]["last_holds"]]


def a_watch_that_polls_keeps_nothing_alive(machines):
    """The synchronous Python SDK's: what stays open is the guest's part of it."""
    sandbox = create(machines)
    sandbox.files.make_dir("/tmp/watched")
    watch = sandbox.files.watch_dir("/tmp/watched")
    last = time.monotonic()
    released(machines, sandbox, last)
    assert watch is not None


def an_open_watch_stream_keeps_nothing_alive_and_its_event_is_use(machines):
    """The asynchronous Python SDK's: a stream that is open from its start to the end of the sandbox."""
    sandbox = create(machines)
    sandbox.files.make_dir("/tmp/watched")

    async def watch() -> dict:
        events, exits = asyncio.Queue(), asyncio.Queue()
        same = await AsyncSandbox.connect(sandbox.sandbox_id, **machines.sdk())
        stream = await same.files.watch_dir("/tmp/watched", on_event=events.put, on_exit=exits.put, timeout=0)
        # A second in the guest after the answer, so that nothing but the event can be the last use.
        sandbox.commands.run("(sleep 3; touch /tmp/watched/file) >/dev/null 2>&1 &")
        event = await asyncio.wait_for(events.get(), 20)
        last = time.monotonic()
        assert event.name == "file"
        assert ("watch", False) in await asyncio.to_thread(holds, machines, sandbox)
        # The rest of what `touch` does to it comes in the same moment.
        told = await asyncio.to_thread(released, machines, sandbox, last, 1.5)
        await asyncio.wait_for(exits.get(), 10)
        assert stream is not None
        return told

    told = asyncio.run(watch())
    assert "watch" in [hold["class"] for hold in told["ended"]["last_holds"]]
    assert "watch" in history(told)


def an_idle_websocket_to_a_guest_port_keeps_nothing_alive(machines):
    sandbox = create(machines)
    sandbox.files.write("/tmp/guest_server.py", SERVER)
    sandbox.commands.run(f"python3 /tmp/guest_server.py {PORT}", background=True, timeout=0).disconnect()
    routing = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(PORT)}
    sandbox.commands.run(
        f"for i in $(seq 100); do (echo >/dev/tcp/127.0.0.1/{PORT}) 2>/dev/null && exit 0; sleep 0.2; done; exit 1"
    )
    url = machines.proxy_url.replace("http", "ws") + "/socket"
    with connect(url, additional_headers=routing, proxy=None, ping_interval=None) as websocket:
        websocket.send("x")
        websocket.recv(timeout=10)
        last = time.monotonic()
        assert ("guest_stream", False) in holds(machines, sandbox)
        told = released(machines, sandbox, last)
    assert "guest_stream" in [hold["class"] for hold in told["ended"]["last_holds"]]


def a_connection_pool_keeps_nothing_alive(machines):
    """The SDK keeps its connections for the next call; some belong to a client of this test's own."""
    sandbox = create(machines)
    token = machines.request("POST", f"/v2/sandboxes/{sandbox.sandbox_id}/connect", json={}).json()["envdAccessToken"]
    with machines.plane({"sandboxID": sandbox.sandbox_id, "envdAccessToken": token}) as pool:
        with ThreadPoolExecutor(8) as callers:
            for answer in callers.map(lambda _: pool.post("/process.Process/List", json={}), range(8)):
                assert answer.status_code == 200
        sandbox.commands.run("true")
        told = released(machines, sandbox, time.monotonic())
    assert told["ended"]["last_holds"] == []
    assert "List" in history(told) or "command" in history(told)


# --- observers are free, and the reason is told ---


def asking_for_the_state_every_second_keeps_nothing_alive_and_is_told_why(machines):
    sandbox = create(machines)
    sandbox.commands.run("true")
    last = time.monotonic()
    over = threading.Event()

    def ask() -> int:
        asked = 0
        while not over.wait(1):
            sandbox.is_running()
            machines.request("GET", f"/sandboxes/{sandbox.sandbox_id}")
            machines.request("GET", "/v2/sandboxes")
            machines.request("GET", "/metrics")
            asked += 1
        return asked

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            told = released(machines, sandbox, last)
        finally:
            over.set()
        assert asking.result() >= 40
    text = json.dumps(told["transitions"])
    assert "health" not in text and "metrics" not in text, "an observer is in the history"
    assert "command" in text or "Start" in text


HAZARDS = [
    a_job_of_three_minutes_with_its_client_attached_is_not_cut,
    a_detached_job_of_three_minutes_is_not_cut_where_such_jobs_count_as_alive,
    a_detached_job_that_computes_for_three_minutes_is_not_cut_under_progress,
    an_open_terminal_keeps_nothing_alive,
    a_watch_that_polls_keeps_nothing_alive,
    an_open_watch_stream_keeps_nothing_alive_and_its_event_is_use,
    an_idle_websocket_to_a_guest_port_keeps_nothing_alive,
    a_connection_pool_keeps_nothing_alive,
    asking_for_the_state_every_second_keeps_nothing_alive_and_is_told_why,
]


@pytest.mark.takes(280)
@pytest.mark.timeout(500)
def test_none_of_the_four_families_of_failures(machines, subtests):
    all_at_once(subtests, HAZARDS, machines)
