"""Who may do what: before the first /init everybody, after it only who has the token, and control only the host."""

import socket

import pytest

from harness.connect import JSON_STREAM, call, envelope, process

TOKEN = {"X-Access-Token": "secret"}


@pytest.fixture
def secured(agent):
    answer = agent.post("/init", json={"accessToken": "secret"})
    assert answer.status_code == 204, answer.text
    return agent


def test_before_init_everything_is_open(agent):
    assert call(agent, "process.Process/List").status_code == 200


@pytest.mark.parametrize("headers", [{}, {"X-Access-Token": "wrong"}, {"X-Access-Token": ""}])
def test_without_the_token_a_call_is_401_json(secured, headers):
    answer = call(secured, "process.Process/List", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["code"] == 401
    assert "access token" in answer.json()["message"]


def test_a_stream_without_the_token_is_401_and_runs_nothing(secured, tmp_path):
    answer = secured.post(
        "/process.Process/Start",
        content=envelope({"process": process("/usr/bin/touch", str(tmp_path / "ran"))}),
        headers={"Content-Type": JSON_STREAM},
    )
    assert answer.status_code == 401
    assert not (tmp_path / "ran").exists()


def test_with_the_token_a_call_runs(secured):
    assert call(secured, "process.Process/List", headers=TOKEN).status_code == 200


def test_health_needs_no_token(secured):
    answer = secured.get("/health")
    assert answer.status_code == 204
    assert answer.headers["cache-control"] == "no-store"


def test_files_need_the_token(secured, tmp_path):
    (tmp_path / "file").write_text("x")
    path = {"path": str(tmp_path / "file")}
    octets = {"Content-Type": "application/octet-stream"}
    for headers in ({}, {"X-Access-Token": "wrong"}):
        assert secured.get("/files", params=path, headers=headers).status_code == 401
        assert secured.post("/files", params=path, content=b"y", headers={**octets, **headers}).status_code == 401
    assert (tmp_path / "file").read_text() == "x"
    assert secured.get("/files", params=path, headers=TOKEN).text == "x"
    assert secured.post("/files", params=path, content=b"y", headers={**octets, **TOKEN}).status_code == 200


@pytest.mark.parametrize("body", [{}, {"accessToken": "mine"}, {"envVars": {"A": "b"}}])
def test_init_cannot_be_repeated_without_the_token(secured, body):
    assert secured.post("/init", json=body).status_code == 401
    assert call(secured, "process.Process/List").status_code == 401, "the old token still holds"
    assert call(secured, "process.Process/List", headers=TOKEN).status_code == 200


def test_init_may_be_repeated_with_the_token(secured):
    answer = secured.post("/init", json={"accessToken": "secret", "envVars": {"A": "b"}}, headers=TOKEN)
    assert answer.status_code == 204
    assert secured.get("/envs", headers=TOKEN).json()["A"] == "b"


@pytest.mark.parametrize("body", [b"{", b'{"accessToken": ""}', b'{"accessToken": 5}'])
def test_a_malformed_init_changes_nothing(agent, body):
    assert agent.post("/init", content=body, headers={"Content-Type": "application/json"}).status_code == 400
    assert call(agent, "process.Process/List").status_code == 200


@pytest.mark.parametrize("credential", [{}, {"X-Guestd-Control": "guess"}, {"X-Guestd-Control": ""}])
@pytest.mark.parametrize("method", ["Get", "Explain", "PrepareRelease", "CommitRelease", "AbortRelease"])
def test_activity_is_for_the_host_alone(secured, method, credential):
    answer = call(secured, f"activity.v1.Activity/{method}", headers={**TOKEN, **credential})
    assert answer.status_code in (401, 404), answer.text


def test_watching_activity_is_for_the_host_alone(secured):
    answer = secured.post(
        "/activity.v1.Activity/Watch",
        content=b"\0\0\0\0\2{}",
        headers={"Content-Type": "application/connect+json", **TOKEN},
    )
    assert answer.status_code in (401, 404), answer.text


@pytest.mark.parametrize("path", ["/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse", "/upgrade"])
def test_other_control_operations_need_more_than_the_token(secured, path):
    assert secured.post(path, headers=TOKEN).status_code in (401, 403, 404, 405, 501)


def test_the_tunnel_is_for_the_host_alone(guestd, secured):
    """HTTP CONNECT from anybody on the network would be a door around every guard."""
    with socket.create_connection(("127.0.0.1", guestd.port), timeout=10) as connection:
        connection.sendall(b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\nX-Access-Token: secret\r\n\r\n")
        status = connection.makefile("rb").readline()
    assert status.split()[1][:1] == b"4", status
