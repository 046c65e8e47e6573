"""What holds a sandbox and what does not, with an idle timeout of one second in containers."""

import socket
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from e2b import Sandbox
from websockets.sync.client import connect

from harness.processes import wait_until

IDLE = 1
SERVER = (Path(__file__).parents[1] / "api/guest_server.py").read_text()
PORT = 8000


@pytest.fixture
def eager(hostd):
    """hostd that releases after a second."""
    return hostd(idle_floor=1)


def create(eager) -> Sandbox:
    return Sandbox.create(metadata={"idle_timeout": str(IDLE)}, **eager.sdk())


def assert_released_on_time(eager, sandbox: Sandbox, last: float) -> None:
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=10)
    assert ended["reason"] == "idle"
    assert IDLE - 0.1 <= at - last <= IDLE + 1, f"released after {at - last:.3f} s: {ended}"


def alive(eager, sandbox: Sandbox) -> bool:
    return eager.explain(sandbox.sandbox_id)["state"] == "running"


@contextmanager
def plane(eager, sandbox: Sandbox, port: int = 49983):
    token = eager.request("POST", f"/v2/sandboxes/{sandbox.sandbox_id}/connect", json={}).json()["envdAccessToken"]
    with eager.plane({"sandboxID": sandbox.sandbox_id, "envdAccessToken": token}, port) as client:
        yield client


def test_an_upload_holds_while_its_bytes_move(eager):
    sandbox = create(eager)

    def slowly():
        for _ in range(10):
            yield b"x" * 1000
            time.sleep(0.4)

    with plane(eager, sandbox) as client:
        answer = client.post(
            "/files",
            params={"path": "/tmp/slow"},
            content=slowly(),
            headers={"Content-Type": "application/octet-stream"},
        )
        last = time.monotonic()
    assert answer.status_code == 200, answer.text
    assert_released_on_time(eager, sandbox, last)


def test_a_running_command_holds_though_it_says_nothing(eager):
    sandbox = create(eager)
    assert sandbox.commands.run("sleep 4; echo done").stdout == "done\n"
    assert_released_on_time(eager, sandbox, time.monotonic())


def test_short_calls_again_and_again_hold(eager):
    sandbox = create(eager)
    for _ in range(6):
        sandbox.files.exists("/tmp")
        last = time.monotonic()
        time.sleep(0.7)
        assert alive(eager, sandbox)
    assert_released_on_time(eager, sandbox, last)


def test_an_open_socket_with_nothing_in_flight_does_not_hold(eager):
    sandbox = create(eager)
    with plane(eager, sandbox) as client:
        assert client.post("/process.Process/List", json={}).status_code == 200
        last = time.monotonic()
        assert_released_on_time(eager, sandbox, last)


def test_a_request_that_never_arrives_whole_does_not_hold(eager):
    """Half a header is no request."""
    sandbox = create(eager)
    url = urlsplit(eager.proxy_url)
    with socket.create_connection((url.hostname, url.port)) as connection:
        last = time.monotonic()
        connection.sendall(f"GET /health HTTP/1.1\r\nE2b-Sandbox-Id: {sandbox.sandbox_id}\r\n".encode())
        assert_released_on_time(eager, sandbox, last)


@pytest.mark.parametrize("what", ["health", "get", "list", "idle", "metrics"])
def test_observers_are_free(eager, what):
    sandbox = create(eager)
    sandbox.commands.run("true")
    last = time.monotonic()
    ask = {
        "health": lambda: sandbox.is_running(),
        "get": lambda: eager.request("GET", f"/sandboxes/{sandbox.sandbox_id}"),
        "list": lambda: eager.request("GET", "/v2/sandboxes"),
        "idle": lambda: eager.explain(sandbox.sandbox_id),
        "metrics": lambda: eager.request("GET", "/metrics"),
    }[what]
    while time.monotonic() - last < IDLE + 0.5 and alive(eager, sandbox):
        ask()
        time.sleep(0.1)
    assert_released_on_time(eager, sandbox, last)


def test_a_detached_command_does_not_hold(eager):
    sandbox = create(eager)
    command = sandbox.commands.run("sleep 100", background=True, timeout=0)
    time.sleep(2.5)
    assert alive(eager, sandbox), "its client is still attached"
    command.disconnect()
    assert_released_on_time(eager, sandbox, time.monotonic())


@pytest.fixture
def serving(eager):
    """A sandbox with a web server, and a client of that."""
    # A longer idle timeout for the time that the server needs to start.
    sandbox = Sandbox.create(metadata={"idle_timeout": "3"}, **eager.sdk())
    sandbox.files.write("/tmp/guest_server.py", SERVER)
    sandbox.commands.run(f"python3 /tmp/guest_server.py {PORT}", background=True, timeout=0).disconnect()
    routing = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(PORT)}
    with httpx.Client(base_url=eager.proxy_url, headers=routing, timeout=20, trust_env=False) as client:
        wait_until(lambda: client.get("/echo").status_code == 200, within=15, what="the server in the guest answers")
        yield sandbox, client, routing


def assert_released_after_three(eager, sandbox, last: float) -> None:
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=10)
    assert ended["reason"] == "idle"
    assert 2.9 <= at - last <= 4, f"released after {at - last:.3f} s: {ended}"


def test_a_request_to_a_guest_port_holds_while_it_is_in_flight(eager, serving):
    sandbox, client, _ = serving
    for _ in range(2):
        assert client.get("/slow").status_code == 200
    assert_released_after_three(eager, sandbox, time.monotonic())


def test_an_open_websocket_holds_at_each_byte_and_not_for_being_open(eager, serving):
    sandbox, _, routing = serving
    url = eager.proxy_url.replace("http", "ws") + "/socket"
    with connect(url, additional_headers=routing, proxy=None, ping_interval=None) as websocket:
        for _ in range(3):
            websocket.send("x")
            websocket.recv(timeout=5)
            last = time.monotonic()
            time.sleep(2)
        assert alive(eager, sandbox), "bytes moved two seconds ago"
        assert_released_after_three(eager, sandbox, last)
