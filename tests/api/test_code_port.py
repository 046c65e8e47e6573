"""What the data plane owes a code interpreter: each line at once, a client that leaves is told of, a cell holds its sandbox, and an ended
sandbox is known. The interpreter is a stand-in on a port of its own, so that these are about the way and not about code."""

import json
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from e2b import Sandbox
from h2.connection import H2Connection
from h2.errors import ErrorCodes

from harness.hostd import TLS_DOMAIN
from harness.processes import wait_until

SERVER = (Path(__file__).parent / "code_server.py").read_text()
PORT = 8000
CODE_PORT = 49999
# What a client's leaving may take until the guest hears of it, in seconds.
TOLD_WITHIN = 1
PLANES = ["plain", "tls", "tls-h2"]


def start(sandbox, port: int) -> None:
    sandbox.files.write("/tmp/code_server.py", SERVER)
    sandbox.commands.run(f"python3 /tmp/code_server.py {port}", background=True, timeout=0)


@contextmanager
def client_of(hostd, sandbox, kind: str, port: int):
    """Routed by headers in the plain, by name over TLS."""
    options = {"timeout": 20, "trust_env": False}
    if kind == "plain":
        routing = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(port)}
        with httpx.Client(base_url=hostd.proxy_url, headers=routing, **options) as client:
            yield client
        return
    context = ssl.create_default_context(cafile=hostd.authority)
    context.check_hostname = False
    host = {"Host": f"{port}-{sandbox.sandbox_id}.{TLS_DOMAIN}"}
    url = f"https://{hostd.tls_address}"
    with httpx.Client(base_url=url, headers=host, verify=context, http2=kind == "tls-h2", **options) as client:
        yield client


@pytest.fixture(params=PLANES)
def interpreter(containers, sandbox, request):
    start(sandbox, PORT)
    with client_of(containers, sandbox, request.param, PORT) as client:
        wait_until(lambda: client.get("/health").status_code == 200, within=15, what="the stand-in answers")
        yield client


def left(client) -> int:
    return client.get("/left").json()


def test_each_line_arrives_before_the_next_is_made(interpreter):
    """The stand-in makes the next one when it is told that the last one is here: whoever collects lines waits for ever."""
    code = "for n in range(5): say(f'{n}\\n')"
    heard = []
    with interpreter.stream("POST", "/execute", json={"code": code}) as answer:
        for line in answer.iter_lines():
            told = json.loads(line)
            heard.append(told.get("text"))
            if told["type"] == "stdout":
                interpreter.post("/arrived")
            assert told["type"] != "error", told
    assert heard == ["0\n", "1\n", "2\n", "3\n", "4\n", None]


@pytest.mark.parametrize("code", ["hang before the answer", "hang()", "say('begun')\nhang()"])
@pytest.mark.parametrize("kind", PLANES)
def test_a_client_that_leaves_is_told_of(containers, sandbox, kind, code):
    start(sandbox, PORT)
    with client_of(containers, sandbox, kind, PORT) as client:
        wait_until(lambda: client.get("/health").status_code == 200, within=15, what="the stand-in answers")
        client.post("/arrived")
        # Of a connection of its own, which it closes.
        with client_of(containers, sandbox, kind, PORT) as leaving:
            if code == "hang before the answer":
                with pytest.raises(httpx.ReadTimeout):
                    leaving.post("/execute", json={"code": code}, timeout=0.5)
            else:
                with leaving.stream("POST", "/execute", json={"code": code}) as answer:
                    assert answer.status_code == 200
                    if "say" in code:
                        next(answer.iter_lines())
        wait_until(lambda: left(client) == 1, within=TOLD_WITHIN, what="the guest hears that its client left")


def test_a_client_that_drops_one_stream_of_many_is_told_of(containers, sandbox):
    start(sandbox, PORT)
    with client_of(containers, sandbox, "plain", PORT) as client:
        wait_until(lambda: client.get("/health").status_code == 200, within=15, what="the stand-in answers")
        context = ssl.create_default_context(cafile=containers.authority)
        context.set_alpn_protocols(["h2"])
        name = f"{PORT}-{sandbox.sandbox_id}.{TLS_DOMAIN}"
        host, port = containers.tls_address.split(":")
        with context.wrap_socket(socket.create_connection((host, int(port)), timeout=20), server_hostname=name) as stream:
            http2 = H2Connection()
            http2.initiate_connection()
            body = b'{"code": "hang before the answer"}'
            head = {":method": "POST", ":scheme": "https", ":authority": name, ":path": "/execute", "content-length": str(len(body))}
            for stream_id in (1, 3):
                http2.send_headers(stream_id, head.items())
                http2.send_data(stream_id, body, end_stream=True)
            stream.sendall(http2.data_to_send())
            time.sleep(0.5)
            assert left(client) == 0
            http2.reset_stream(3, ErrorCodes.CANCEL)
            stream.sendall(http2.data_to_send())
            wait_until(lambda: left(client) == 1, within=TOLD_WITHIN, what="the guest hears that one left")
            time.sleep(0.3)
            assert left(client) == 1, "the other one goes on"


def test_a_killed_sandbox_ends_a_running_cell_at_once(sandbox, interpreter):
    interpreter.post("/arrived")
    killer = threading.Timer(0.5, sandbox.kill)
    killer.start()
    begun = time.monotonic()
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        with interpreter.stream("POST", "/execute", json={"code": "say('begun')\nhang()"}) as answer:
            answer.read()
    assert time.monotonic() - begun < 3
    killer.join()
    answer = interpreter.post("/execute", json={"code": "1"})
    assert (answer.status_code, answer.json()["message"]) == (502, "The sandbox was not found")


# --- idleness ---


def classes(hostd, created: dict) -> set[str]:
    return {hold["class"] for hold in hostd.explain(created["sandboxID"])["holds"] if hold["counts"]}


def holds(hostd, sandbox) -> set[str]:
    return classes(hostd, {"sandboxID": sandbox.sandbox_id})


@pytest.mark.takes(10)
def test_a_running_cell_holds_its_sandbox_and_its_end_lets_go(hostd):
    supervisor = hostd(idle_floor=2)
    sandbox = Sandbox.create(metadata={"idle_timeout": "2"}, **supervisor.sdk())
    start(sandbox, PORT)
    with client_of(supervisor, sandbox, "plain", PORT) as client:
        wait_until(lambda: client.get("/health").status_code == 200, within=15, what="the stand-in answers")
        code = "import time; time.sleep(4); print('done')"
        with client.stream("POST", "/execute", json={"code": code}) as answer:
            time.sleep(1)
            assert holds(supervisor, sandbox) >= {"guest_port"}
            assert "done" in answer.read().decode()
        last = time.monotonic()
    at, ended = supervisor.wait_until_ended(sandbox.sandbox_id, within=10)
    assert ended["reason"] == "idle"
    assert 1.9 <= at - last <= 3.2, f"released after {at - last:.3f} s: {ended}"


@pytest.mark.takes(15)
def test_a_cell_that_is_over_does_not_hold_for_a_client_that_does_not_read(hostd):
    """The agent's door: a cell's megabytes are on their way for as long as their client likes."""
    supervisor = hostd(idle_floor=2)
    created = supervisor.create(templateID="code-interpreter-v1", metadata={"idle_timeout": "6"})
    with supervisor.plane(created, port=CODE_PORT) as client:
        client.timeout = 120
        client.post("/execute", json={"code": "1"})
        code = "for n in range(20_000): print('x' * 999)"
        with client.stream("POST", "/execute", json={"code": code}) as answer:
            assert answer.headers["x-execution-id"]
            began = time.monotonic()
            wait_until(lambda: classes(supervisor, created) == set(), within=20, what="nothing holds the sandbox")
            at, ended = supervisor.wait_until_ended(created["sandboxID"], within=30)
    assert ended["reason"] == "idle" and at - began < 30
