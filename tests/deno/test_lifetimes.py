"""Sessions end with the socket that created them, durations at their time, and both when somebody says so (contract: deno.md section 5)."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from websockets.exceptions import ConnectionClosed

from harness import door, locations

# What the issue of a session promises, from the close of its socket to its machine being gone.
SESSION_END = 2


def machine_is_gone(hostd, sandbox_id: str, within: float = SESSION_END) -> bool:
    deadline = time.monotonic() + within
    while sandbox_id in hostd.guards():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def closed_with(connection, within: float) -> tuple[int, str]:
    """The close frame that hostd sent; whatever came before it is dropped."""
    deadline = time.monotonic() + within
    with pytest.raises(ConnectionClosed) as closed:
        while True:
            connection.recv(timeout=max(0.0, deadline - time.monotonic()))
    assert closed.value.rcvd, "the connection broke off without a close frame"
    return closed.value.rcvd.code, closed.value.rcvd.reason


def extend(hostd, sandbox_id: str, seconds: float) -> float:
    """The new end that hostd told, in seconds since 1970."""
    stop_at = int((time.time() + seconds) * 1000)
    answer = hostd.request("PATCH", f"/api/v3/sandbox/{sandbox_id}", json={"stop_at_ms": stop_at})
    assert answer.status_code == 200, answer.text
    return answer.json()["stop_at_ms"] / 1000


# Runs in a process of its own, so that it can be killed and frozen.
CLIENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from harness import door
class Hostd: api_url = sys.argv[2]
connection = door.create(Hostd)
print(door.id_of(connection), flush=True)
time.sleep(600)
"""


def client_process(hostd) -> tuple[subprocess.Popen, str]:
    tests = locations.REPOSITORY / "tests"
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(tests), hostd.api_url], stdout=subprocess.PIPE, text=True
    )
    sandbox_id = client.stdout.readline().strip()
    assert sandbox_id, f"the client ended with {client.wait(10)}"
    return client, sandbox_id


def test_a_session_is_gone_two_seconds_after_its_socket_closed(containers):
    connection = door.create(containers)
    sandbox_id = door.id_of(connection)
    assert door.listed(containers)[sandbox_id]["status"] == "running"

    connection.close()

    assert machine_is_gone(containers, sandbox_id)
    assert containers.tombstone(sandbox_id)["reason"] == "session"
    entry = door.listed(containers)[sandbox_id]
    assert entry["status"] == "stopped" and entry["stoppedAt"] >= entry["createdAt"]


def test_a_session_ends_with_a_client_that_is_killed(containers):
    client, sandbox_id = client_process(containers)
    client.send_signal(signal.SIGKILL)
    client.wait(10)

    assert machine_is_gone(containers, sandbox_id)
    assert containers.tombstone(sandbox_id)["reason"] == "session"


@pytest.mark.takes(5)
def test_a_session_ends_within_the_liveness_limit_of_a_client_that_is_frozen(hostd):
    supervisor = hostd("container", deno_liveness=3)
    client, sandbox_id = client_process(supervisor)
    try:
        time.sleep(4)
        assert supervisor.tombstone(sandbox_id) is None, "its pongs are signs of life"
        client.send_signal(signal.SIGSTOP)
        frozen = time.monotonic()
        ended, tombstone = supervisor.wait_until_ended(sandbox_id, within=5)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait(10)

    assert tombstone["reason"] == "session"
    assert 2 <= ended - frozen <= 3.5


@pytest.mark.takes(4)
def test_a_silent_client_ends_its_session_and_no_duration(hostd):
    supervisor = hostd("container", deno_liveness=2)
    with door.silent_client(supervisor) as session, door.silent_client(supervisor, timeout="5m") as lasting:
        _, tombstone = supervisor.wait_until_ended(session, within=4)
        assert tombstone["reason"] == "session"
        time.sleep(1)
        assert supervisor.tombstone(lasting) is None


@pytest.mark.takes(3)
def test_a_duration_outlives_its_client_and_ends_at_its_time(containers):
    begun = time.monotonic()
    with door.create(containers, timeout="3s") as connection:
        ready = time.monotonic()
        sandbox_id = door.id_of(connection)
    time.sleep(1)
    with door.join(containers, sandbox_id) as second:
        assert door.id_of(second) == sandbox_id
        assert closed_with(second, within=4) == (1001, "the sandbox has ended: timeout")
        ended = time.monotonic()

    assert ended - begun >= 3 and ended - ready <= 4
    assert containers.tombstone(sandbox_id)["reason"] == "timeout"


def test_only_the_socket_that_created_a_session_ends_it(containers):
    with door.create(containers) as primary:
        sandbox_id = door.id_of(primary)
        with door.join(containers, sandbox_id):
            pass
        time.sleep(0.5)
        assert containers.tombstone(sandbox_id) is None
        second = door.join(containers, sandbox_id)

    assert closed_with(second, within=SESSION_END) == (1001, "the sandbox has ended: session")
    answer = containers.request("GET", f"/api/v3/sandbox/{sandbox_id}")
    assert answer.status_code == 405


@pytest.mark.takes(4)
def test_extend_tells_the_new_end_and_keeps_it(containers):
    sandbox_id = door.create_lasting(containers, "2s")
    asked = time.time() + 4
    told = extend(containers, sandbox_id, 4)
    assert told == pytest.approx(asked, abs=0.1)

    with door.join(containers, sandbox_id) as connection:
        closed_with(connection, within=6)
        assert told <= time.time() <= told + 1
    assert containers.tombstone(sandbox_id)["reason"] == "timeout"


@pytest.mark.takes(2)
def test_a_session_whose_end_is_moved_stays_a_session(containers):
    with door.create(containers) as connection:
        sandbox_id = door.id_of(connection)
        extend(containers, sandbox_id, 60)
    assert machine_is_gone(containers, sandbox_id)
    assert containers.tombstone(sandbox_id)["reason"] == "session"

    with door.create(containers) as connection:
        sandbox_id = door.id_of(connection)
        extend(containers, sandbox_id, 1)
        assert closed_with(connection, within=3) == (1001, "the sandbox has ended: timeout")


@pytest.mark.takes(4)
def test_nothing_outlives_the_maximum_lifetime(hostd):
    supervisor = hostd("container", max_lifetime=4)
    with door.create(supervisor) as session:
        lasting = door.create_lasting(supervisor, "5m")
        told = extend(supervisor, lasting, 7200)
        assert told <= time.time() + 4.1
        assert closed_with(session, within=6) == (1001, "the sandbox has ended: lifetime")
    _, tombstone = supervisor.wait_until_ended(lasting, within=3)
    assert tombstone["reason"] == "lifetime"


@pytest.mark.parametrize("path", ["/api/v3/sandbox/", "/api/v3/sandboxes/"])
def test_kill_closes_every_socket_at_once(containers, path):
    with door.create(containers, timeout="5m") as creator:
        sandbox_id = door.id_of(creator)
        sockets = [creator, *(door.join(containers, sandbox_id) for _ in range(3))]

        begun = time.monotonic()
        assert containers.request("DELETE", path + sandbox_id).status_code == 204
        for connection in sockets:
            assert closed_with(connection, within=2) == (1001, "the sandbox has ended: killed")
        assert time.monotonic() - begun < 2
        assert machine_is_gone(containers, sandbox_id)

    assert containers.tombstone(sandbox_id)["reason"] == "killed"
    again = containers.request("DELETE", path + sandbox_id)
    assert again.status_code == 404 and again.json()["code"] == "SANDBOX_NOT_FOUND"


def test_many_sessions_live_and_end_at_once(containers):
    count = 16
    with ExitStack() as sockets, ThreadPoolExecutor(count) as threads:
        connections = list(threads.map(lambda _: door.create(containers), range(count)))
        ids = {door.id_of(sockets.enter_context(connection)) for connection in connections}
        assert len(ids) == count
        assert ids <= {sandbox_id for sandbox_id, entry in door.listed(containers).items() if entry["status"] == "running"}
    for sandbox_id in ids:
        assert machine_is_gone(containers, sandbox_id, within=10)
        assert containers.tombstone(sandbox_id)["reason"] == "session"


def test_a_client_that_leaves_during_the_boot_leaves_nothing_behind(containers):
    known = set(door.listed(containers))
    with door.create_raw(containers, timeout="5m"), door.create_raw(containers):
        pass
    time.sleep(0.5)
    deadline = time.monotonic() + 20
    while containers.guards() and time.monotonic() < deadline:
        time.sleep(0.1)

    assert not containers.guards()
    new = set(door.listed(containers)) - known
    assert {containers.tombstone(sandbox_id)["reason"] for sandbox_id in new} <= {"killed", "session"}


@pytest.mark.takes(4)
def test_after_kill_9_of_hostd_durations_keep_their_end_and_sessions_are_over(hostd):
    supervisor = hostd("container")
    session = door.create(supervisor)
    lasting = door.create_lasting(supervisor, "5m", labels={"who": "me"})
    told = extend(supervisor, lasting, 6)

    supervisor.kill9()
    supervisor.restart()

    _, tombstone = supervisor.wait_until_ended(door.id_of(session), within=SESSION_END)
    assert tombstone["reason"] == "session"
    assert door.listed(supervisor)[lasting]["labels"] == {"who": "me"}
    with door.join(supervisor, lasting) as connection:
        assert closed_with(connection, within=8) == (1001, "the sandbox has ended: timeout")
        assert told <= time.time() <= told + 1
    session.close()
