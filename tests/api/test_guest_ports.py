"""A web server inside the sandbox, reached through the proxy: plain, streamed and as a WebSocket."""

import os
import time
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from harness.processes import wait_until

SERVER = (Path(__file__).parent / "guest_server.py").read_text()
PORT = 8000


def serve(sandbox, address: str) -> None:
    sandbox.files.write("/tmp/guest_server.py", SERVER)
    sandbox.commands.run(f"python3 /tmp/guest_server.py {PORT} {address}", background=True, timeout=0)


def routing(sandbox) -> dict:
    return {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(PORT)}


@pytest.fixture(params=["127.0.0.1", "0.0.0.0"])
def server(containers, sandbox, request):
    serve(sandbox, request.param)
    with httpx.Client(base_url=containers.proxy_url, headers=routing(sandbox), timeout=20, trust_env=False) as client:
        wait_until(lambda: client.get("/echo").status_code == 200, within=15, what="the server in the guest answers")
        yield client


def test_a_request_arrives_as_it_was_sent(server):
    told = server.post("/echo/a%20b?c=d&e=%2F", content=b"x" * 100_000, headers={"X-Mine": "y"}).json()
    assert (told["method"], told["path"], told["length"]) == ("POST", "/echo/a%20b?c=d&e=%2F", 100_000)
    assert told["headers"]["x-mine"] == "y"


def test_the_host_name_routes_to_a_port(containers, sandbox, server):
    host = f"{PORT}-{sandbox.sandbox_id}.sbx.localhost"
    answer = httpx.get(containers.proxy_url + "/echo", headers={"Host": host}, trust_env=False)
    assert answer.json()["headers"]["host"] == host


def test_a_streamed_answer_is_not_collected_on_its_way(server):
    arrived = []
    with server.stream("GET", "/slow") as answer:
        for line in answer.iter_lines():
            arrived.append((line, time.monotonic()))
    assert [line for line, _ in arrived] == ["0", "1", "2", "3", "4"]
    assert arrived[-1][1] - arrived[0][1] > 1, "the first line came long before the last"


def test_a_websocket_carries_both_ways(containers, sandbox, server):
    url = containers.proxy_url.replace("http", "ws") + "/socket"
    with connect(url, additional_headers=routing(sandbox), proxy=None, max_size=None) as socket:
        for message in ("hello", "ü" * 1000, b"\0\1", os.urandom(1_000_000)):
            socket.send(message)
            assert socket.recv(timeout=20) == message


def test_an_open_websocket_ends_with_its_sandbox(containers, sandbox, server):
    url = containers.proxy_url.replace("http", "ws") + "/socket"
    with connect(url, additional_headers=routing(sandbox), proxy=None) as socket:
        socket.send("x")
        socket.recv(timeout=20)
        sandbox.kill()
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=10)
