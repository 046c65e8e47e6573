"""What the door says to calls that it does not serve, and to clients that are wrong or hostile (contract: deno.md sections 2 to 4)."""

import json
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from harness import door

ID = re.compile(r"sbx_ord_[0-9a-hjkmnp-z]{20}")


@pytest.fixture
def connection(containers):
    with door.create(containers) as connection:
        yield connection


def refused(hostd, path: str, headers: dict, **options) -> tuple[int, dict]:
    """The answer to a handshake that must fail: its status and its body."""
    with pytest.raises(InvalidStatus) as refusal:
        door.dial(hostd, path, headers, **options)
    response = refusal.value.response
    return response.status_code, json.loads(response.body)


def refused_config(hostd, config: dict) -> tuple[int, dict]:
    return refused(hostd, "/api/v3/sandboxes/create", {"x-deno-sandbox-config": door.config_header(config)})


def call(connection, method: str, call_id=1, **params) -> dict:
    connection.send(json.dumps({"jsonrpc": "2.0", "id": call_id, "method": method, "params": params}))
    return json.loads(connection.recv(timeout=5))


def test_the_id_is_one_that_the_sdk_takes(connection):
    assert ID.fullmatch(door.id_of(connection))


@pytest.mark.parametrize("method", ["spawn", "processWait", "readTextFile", "envSet", "spawnDeno", "exposeHttp", "fetch", "nonsense"])
def test_a_call_into_the_guest_gets_a_protocol_error_and_the_socket_lives_on(connection, method):
    for call_id in (0, 7):
        assert call(connection, method, call_id, command="ls") == {
            "jsonrpc": "2.0",
            "id": call_id,
            "error": {"code": -32601, "message": "Method not found"},
        }


def test_a_text_ping_gets_its_pong_and_nobody_else_does(connection):
    connection.send("ping")
    assert connection.recv(timeout=5) == "pong"
    connection.send(json.dumps({"jsonrpc": "2.0", "method": "$sandbox.stream.end", "params": {"streamId": 1}}))
    with pytest.raises(TimeoutError):
        connection.recv(timeout=0.5)


def test_a_large_call_is_read_and_one_too_large_is_told_so(connection):
    assert call(connection, "writeFile", content="x" * 11_000_000)["error"]["code"] == -32601

    with pytest.raises(ConnectionClosed) as closed:
        connection.send("x" * (17 << 20))
        connection.recv(timeout=10)
    assert closed.value.rcvd.code == 1009


@pytest.mark.takes(15)
def test_the_code_arrives_however_long_the_client_goes_on_sending(containers):
    """hostd has closed long before the rest comes: a reset would take the close frame with it."""
    sandbox_id = door.create_lasting(containers, "5m")

    def too_large(pause: float) -> int:
        with door.join_raw(containers, sandbox_id) as raw:
            raw.sendall(b"\x82\xff" + struct.pack(">Q", 17 << 20) + b"mask")
            for _ in range(17):
                raw.sendall(bytes(1 << 20))
                time.sleep(pause)
            return close_code(raw)

    with ThreadPoolExecutor(10) as threads:
        codes = list(threads.map(too_large, [0, 0.01, 0.2] * 10))
    assert codes == [1009] * 30


def close_code(raw: socket.socket) -> int:
    """Of the close frame, after which nothing comes."""
    opcode, size = raw.recv(2, socket.MSG_WAITALL)
    assert opcode == 0x88
    frame = raw.recv(size, socket.MSG_WAITALL)
    assert raw.recv(1) == b"", "and then the end, in order"
    return struct.unpack(">H", frame[:2])[0]


@pytest.mark.parametrize(
    ("message", "code"), [("{", 4000), ("pong", 4000), (b"\xff", 4000), ("[]", 4001), ("{}", 4001), ("[" * 100_000, 4001)]
)
def test_what_is_no_call_closes_the_socket_with_its_code_and_ends_the_session(containers, connection, message, code):
    connection.send(message)
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(timeout=5)
    assert closed.value.rcvd.code == code
    _, tombstone = containers.wait_until_ended(door.id_of(connection), within=2)
    assert tombstone["reason"] == "session"


@pytest.mark.parametrize("timeout", ["5h", "abc", "", "5", "0s", "-5m", "1.5m", "10ms", 300])
def test_a_bad_timeout_is_refused_with_the_rule(containers, timeout):
    status, body = refused_config(containers, {"timeout": timeout})
    assert (status, body["code"]) == (400, "INVALID_CONFIG")
    assert body["message"].startswith('timeout: must be "session" or a positive duration')


def test_a_deadline_that_is_past_is_refused(containers):
    status, body = refused_config(containers, {"stop_at_ms": int(time.time() * 1000) - 1000})
    assert (status, body["code"]) == (400, "INVALID_CONFIG")
    sandbox_id = door.create_lasting(containers, "5m")
    for bad in ({"stop_at_ms": 1}, {"stop_at_ms": "1"}, {}, [], 1):
        answer = containers.request("PATCH", f"/api/v3/sandbox/{sandbox_id}", json=bad)
        assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST"), bad
        assert answer.json()["message"].startswith("stop_at_ms: ")
    assert containers.request("PATCH", f"/api/v3/sandbox/{sandbox_id}", content=b"{").status_code == 400
    assert containers.tombstone(sandbox_id) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("secrets", {"A": {"hosts": ["a"], "value": "b"}}), ("volumes", {"/data": "v"}), ("root", {"volume": "v"}), ("labels", {"a": 1})],
)
def test_what_this_host_cannot_give_is_refused_not_lost(containers, field, value):
    status, body = refused_config(containers, {field: value})
    assert (status, body["code"]) == (400, "INVALID_CONFIG")
    assert body["message"].startswith(f"{field}: ")


def test_a_handshake_without_a_config_or_with_a_broken_one_is_refused(containers):
    path = "/api/v3/sandboxes/create"
    for headers in ({}, {"x-deno-sandbox-config": "no base64"}, {"x-deno-sandbox-config": "W10="}):
        status, body = refused(containers, path, headers)
        assert (status, body["code"]) == (400, "INVALID_CONFIG")
    answer = containers.request("GET", path)
    assert (answer.status_code, answer.json()["code"]) == (426, "NOT_A_WEBSOCKET")


def test_a_config_of_48_kib_is_taken(containers):
    with door.create(containers, env={"BIG": "x" * 36_000}) as connection:
        assert ID.fullmatch(door.id_of(connection))


def test_an_unknown_or_ended_sandbox_is_not_found(containers):
    ended = door.create_lasting(containers, "5m")
    assert containers.request("DELETE", f"/api/v3/sandbox/{ended}").status_code == 204
    others = containers.create()["sandboxID"]
    for sandbox_id in (ended, "sbx_ord_" + "0" * 20, "sbx_ord_abc123def456", "nonsense", others, "a" * 5000):
        status, body = refused(containers, f"/api/v3/sandbox/{sandbox_id}/connect", {})
        assert (status, body["code"]) == (404, "SANDBOX_NOT_FOUND")
        for method, path in (("DELETE", "/api/v3/sandbox/"), ("DELETE", "/api/v3/sandboxes/"), ("PATCH", "/api/v3/sandbox/")):
            stop_at = {"stop_at_ms": int(time.time() * 1000) + 60_000}
            answer = containers.request(method, path + sandbox_id, json=stop_at if method == "PATCH" else None)
            assert (answer.status_code, answer.json()["code"]) == (404, "SANDBOX_NOT_FOUND")
    assert others in containers.sandboxes()


def test_the_list_shows_this_doors_sandboxes_by_label_and_by_page(containers):
    others = containers.create()["sandboxID"]
    mark = str(time.time_ns())
    ids = [door.create_lasting(containers, "5m", labels={"mark": mark, "n": str(n)}) for n in range(3)]

    assert others not in door.listed(containers)
    for query in ({"labels[mark]": mark}, {"labels": f"{{'mark': '{mark}'}}"}):
        assert set(door.listed(containers, **query)) == set(ids)
    assert set(door.listed(containers, **{"labels[mark]": mark, "labels[n]": "1"})) == {ids[1]}
    first = containers.request("GET", "/api/v3/sandboxes", params={"limit": 1})
    link = re.fullmatch(r'<(http://\S+\?cursor=(\S+))>; rel="next"', first.headers["link"])
    assert first.json()[0]["id"] == ids[2]
    for cursor in (link[1], link[2]):
        assert containers.request("GET", "/api/v3/sandboxes", params={"limit": 1, "cursor": cursor}).json()[0]["id"] == ids[1]


def test_a_wrong_token_is_refused_by_its_code(hostd):
    supervisor = hostd("container", api_key=door.TOKEN)
    path = "/api/v3/sandboxes/create"
    status, body = refused(supervisor, path, {"x-deno-sandbox-config": door.config_header({})}, token="ddo_wrong")
    assert (status, body["code"]) == (401, "INVALID_TOKEN")
    with door.create(supervisor) as connection:
        sandbox_id = door.id_of(connection)
        for method in ("PATCH", "DELETE"):
            answer = supervisor.request(method, f"/api/v3/sandbox/{sandbox_id}", headers={"X-API-KEY": "wrong"})
            assert (answer.status_code, answer.json()["code"]) == (401, "INVALID_TOKEN")


def test_a_web_page_without_a_key_is_refused(containers):
    bare = httpx.get(f"{containers.api_url}/api/v3/sandboxes", headers={"Origin": "https://evil.example"}, trust_env=False)
    assert (bare.status_code, bare.json()["code"]) == (401, "INVALID_TOKEN")


def test_a_full_host_says_so(hostd):
    supervisor = hostd("container", max_sandboxes=1)
    with door.create(supervisor):
        status, body = refused_config(supervisor, {})
        assert (status, body["code"]) == (429, "TOO_MANY_SANDBOXES")


def test_what_is_not_there_says_so_in_the_sdks_form(containers):
    sandbox_id = door.create_lasting(containers, "5m")
    for method, path, status, code in (
        ("POST", f"/api/v3/sandbox/{sandbox_id}/expose/http", 501, "NOT_IMPLEMENTED"),
        ("POST", f"/api/v3/sandbox/{sandbox_id}/expose/ssh", 501, "NOT_IMPLEMENTED"),
        ("POST", f"/api/v2/sandboxes/{sandbox_id}/deploy", 501, "NOT_IMPLEMENTED"),
        ("GET", "/api/v2/apps", 501, "NOT_IMPLEMENTED"),
        ("GET", "/api/v3/nonsense", 404, "NOT_FOUND"),
        ("PUT", f"/api/v3/sandbox/{sandbox_id}", 405, "METHOD_NOT_ALLOWED"),
    ):
        answer = containers.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (status, code), path
        assert answer.json()["message"]
