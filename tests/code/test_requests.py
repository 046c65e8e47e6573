"""Requests that are wrong, credentials, and the connection itself (contract: envd.md sections 7.1 and 7.8)."""

import json
import socket
import time

import httpx
import pytest

TOKEN = "the-token-of-this-sandbox"
NOBODY = "00000000-0000-4000-8000-000000000000"


def test_health_is_a_json_string(door):
    answer = door.http.get("/health")
    assert (answer.status_code, answer.json()) == (200, "OK")


def test_context_and_language_together_are_refused(door):
    known = door.contexts()[0]["id"]
    answer = door.ask(code="1", context_id=known, language="python")
    assert (answer.status_code, answer.text) == (400, "Only one of context_id or language can be provided")
    assert answer.headers["content-type"].startswith("text/plain")


def test_an_unknown_context_is_not_found_on_every_route(door):
    answers = [door.ask(code="1", context_id=NOBODY), door.restart(NOBODY), door.delete(NOBODY), door.interrupt(NOBODY)]
    assert [(answer.status_code, answer.text) for answer in answers] == [(404, f"Context {NOBODY} not found")] * 4


def test_an_unknown_language_is_an_error_that_names_it(door):
    before = [each["id"] for each in door.contexts()]
    for answer in (door.ask(code="1", language="cobol"), door.http.post("/contexts", json={"language": "cobol"})):
        assert answer.status_code == 500 and "cobol" in answer.text, answer.text
        assert answer.headers["content-type"].startswith("text/plain")
    assert [each["id"] for each in door.contexts()] == before


@pytest.mark.parametrize(
    "body, where",
    [
        ({}, "code"),
        ({"code": None}, "code"),
        ({"code": 5}, "code"),
        ({"code": "1", "language": 5}, "language"),
        ({"code": "1", "context_id": ["a"]}, "context_id"),
        ({"code": "1", "env_vars": ["A=b"]}, "env_vars"),
        ({"code": "1", "env_vars": {"A": 5}}, "env_vars"),
        ({"code": "1", "timeout": 0}, "timeout"),
        ({"code": "1", "timeout": -1}, "timeout"),
        ({"code": "1", "timeout": "soon"}, "timeout"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else value,
)
def test_a_field_that_is_wrong_is_named(door, body, where):
    answer = door.ask(**body)
    assert answer.status_code == 422, answer.text
    [first, *_] = answer.json()["detail"]
    assert first.keys() >= {"loc", "msg", "type"} and where in first["loc"], first


@pytest.mark.parametrize("path", ["/execute", "/contexts", "/executions"])
@pytest.mark.parametrize("body", [b"{", b"", b"[]", b"5", b'"code"', b"\xff\xfe", b'{"code": "\\ud800"', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(door, path, body):
    if path == "/contexts" and body == b"":
        pytest.skip("a context without wishes needs no body")
    answer = door.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert door.http.get("/health").status_code == 200


def test_fields_that_nobody_knows_are_ignored(door):
    assert door.run("1 + 1", something="else", nested={"a": [1]}).text == "2"


def test_null_is_absence(door):
    assert door.run("1 + 1", context_id=None, language=None, env_vars=None).text == "2"


def test_routes_and_methods_that_are_not_there_are_refused(door):
    attempts = [
        ("GET", "/"),
        ("GET", "/nothing"),
        ("GET", "/execute"),
        ("PUT", "/contexts"),
        ("POST", "/contexts/x/y/z"),
        ("DELETE", "/contexts"),
    ]
    for method, path in attempts:
        assert door.http.request(method, path).status_code in (404, 405), (method, path)


@pytest.mark.parametrize("context_id", ["..", "%2e%2e", "a/b", "x" * 10_000, "%00", "%ff", "'; drop"])
def test_a_hostile_context_id_is_just_unknown(door, context_id):
    answer = door.http.post(f"/contexts/{context_id}/restart")
    assert answer.status_code in (400, 404, 405, 414, 431), answer.text
    assert door.http.get("/health").status_code == 200


def test_a_browser_may_ask_from_anywhere(door):
    headers = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-access-token,e2b-sandbox-id",
    }
    for path in ("/execute", "/contexts", "/executions"):
        preflight = door.http.options(path, headers=headers)
        assert preflight.status_code in (200, 204), preflight.text
        assert preflight.headers["access-control-allow-origin"] in ("*", "https://example.org")
        assert (
            "POST" in preflight.headers["access-control-allow-methods"]
            or preflight.headers["access-control-allow-methods"] == "*"
        )
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert allowed == "*" or all(name in allowed for name in ("content-type", "x-access-token", "e2b-sandbox-id"))
    answer = door.http.post("/execute", json={"code": "1"}, headers={"Origin": "https://example.org"})
    assert answer.headers["access-control-allow-origin"] in ("*", "https://example.org")


def test_one_connection_serves_on_after_errors_and_cells(interpreter):
    """As the SDKs' pools use it; each answer is read to its end before the next question."""
    with socket.create_connection(("127.0.0.1", interpreter.code_port), timeout=30) as raw:
        file = raw.makefile("rb")

        def ask(method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            status = int(file.readline().split()[1])
            headers = {}
            while (line := file.readline().strip()) != b"":
                name, value = line.decode().split(":", 1)
                headers[name.lower()] = value.strip()
            if headers.get("transfer-encoding") == "chunked":
                content = b""
                while size := int(file.readline(), 16):
                    content += file.read(size)
                    file.readline()
                file.readline()
                return status, content
            return status, file.read(int(headers.get("content-length", 0)))

        assert ask("POST", "/execute", b"{")[0] in (400, 422)
        status, body = ask("POST", "/execute", b'{"code": "40 + 2"}')
        assert status == 200 and b'"text":"42"' in body.replace(b" ", b"")
        assert ask("POST", f"/contexts/{NOBODY}/restart")[0] == 404
        assert ask("POST", "/execute", json.dumps({"code": "1", "context_id": NOBODY}).encode())[0] == 404
        assert ask("GET", "/contexts")[0] == 200
        assert ask("POST", "/execute", b'{"code": "1/0"}')[0] == 200
        assert ask("GET", "/health") == (200, b'"OK"')


def test_a_body_that_announces_too_much_is_refused_before_it_comes(interpreter):
    with socket.create_connection(("127.0.0.1", interpreter.code_port), timeout=20) as raw:
        raw.sendall(
            b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
            + b'{"code":"'
        )
        assert b" 413 " in raw.recv(4096).split(b"\r\n")[0]
    assert interpreter.door.run("1 + 1").text == "2"


def test_a_body_that_never_ends_does_not_fill_the_memory(interpreter):
    before = interpreter.memory()
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", interpreter.code_port), timeout=5) as raw:
        raw.sendall(b"POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while sent < 600_000_000:
                raw.sendall(chunk)
                sent += 0x10000
        except OSError:
            pass
        assert sent < 600_000_000, "it read everything"
        assert interpreter.memory() - before < 200_000_000
    assert interpreter.door.run("1 + 1").text == "2"


def test_a_request_that_is_half_sent_holds_nobody_up(interpreter):
    with socket.create_connection(("127.0.0.1", interpreter.code_port)) as raw:
        raw.sendall(b'POST /execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"code":')
        began = time.monotonic()
        assert interpreter.door.run("1 + 1").text == "2"
        assert time.monotonic() - began < 5


# --- credentials ---


@pytest.fixture
def secured(fresh):
    return fresh(accessToken=TOKEN)


def test_the_token_is_asked_for_where_code_runs_and_health_needs_none(secured):
    door = secured.door
    right = {"X-Access-Token": TOKEN}
    for headers in ({}, {"X-Access-Token": "wrong"}, {"X-Access-Token": ""}, {"Authorization": f"Bearer {TOKEN}"}):
        for method, path in (
            ("POST", "/execute"),
            ("POST", "/executions"),
            ("GET", "/executions"),
            ("GET", f"/executions/{NOBODY}"),
            ("DELETE", f"/executions/{NOBODY}"),
        ):
            answer = door.http.request(method, path, json={"code": "1"} if method == "POST" else None, headers=headers)
            assert answer.status_code == 401, (method, path, headers, answer.text)
            assert answer.json()["code"] == 401, answer.text
    assert door.http.get("/health").status_code == 200
    answer = door.http.post("/execute", json={"code": "6 * 7"}, headers=right)
    assert answer.status_code == 200 and '"42"' in answer.text
    assert door.http.get("/executions", headers=right).status_code == 200


def test_contexts_need_no_token_but_refuse_a_wrong_one(secured):
    """The SDKs send none there."""
    door = secured.door
    assert [each["language"] for each in door.contexts()][0] == "python"
    made = door.create()
    assert door.restart(made["id"]).status_code == 200
    wrong = {"X-Access-Token": "wrong"}
    refusals = [
        door.http.get("/contexts", headers=wrong),
        door.http.post("/contexts", json={}, headers=wrong),
        door.http.post(f"/contexts/{made['id']}/restart", headers=wrong),
        door.http.delete(f"/contexts/{made['id']}", headers=wrong),
    ]
    assert [answer.status_code for answer in refusals] == [401] * 4
    assert door.delete(made["id"]).status_code == 200


def test_a_token_that_changes_changes_at_once(secured):
    ask = lambda token: secured.door.http.post(
        "/execute", json={"code": "1"}, headers={"X-Access-Token": token}
    ).status_code  # noqa: E731
    assert (ask(TOKEN), ask("next")) == (200, 401)
    moved = httpx.post(
        f"{secured.url}/init",
        json={"accessToken": "next"},
        headers={"X-Guestd-Control": "host", "X-Access-Token": TOKEN},
        trust_env=False,
    )
    assert moved.status_code == 204, moved.text
    assert (ask(TOKEN), ask("next")) == (401, 200)
