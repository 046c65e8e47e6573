"""How the data plane finds the sandbox (contracts/control-plane.md 2.5), and what it never lets through."""

import base64
import hashlib
import socket
from urllib.parse import urlsplit

import httpx
import pytest

UNKNOWN = "i" + "0" * 20


@pytest.fixture
def created(containers):
    return containers.create()


@pytest.fixture
def plane(containers):
    """A client of the proxy that says nothing by itself."""
    with httpx.Client(base_url=containers.proxy_url, timeout=20, trust_env=False) as client:
        yield client


def proof(plane, **headers) -> httpx.Response:
    """A call that only the right sandbox answers with 200: it needs that sandbox's token."""
    return plane.post("/process.Process/List", json={}, headers=headers)


# --- rule 1: routing headers ---


@pytest.mark.parametrize("vendor", ["E2b", "e2b", "Novita", "PPIO", "ppio"])
@pytest.mark.parametrize("suffix", ["", "-6532622b"])
def test_every_vendors_headers_route(plane, created, vendor, suffix):
    answer = proof(
        plane,
        **{
            f"{vendor}-Sandbox-Id": created["sandboxID"] + suffix,
            f"{vendor}-Sandbox-Port": "49983",
            "X-Access-Token": created["envdAccessToken"],
        },
    )
    assert answer.status_code == 200, answer.text


def test_routing_headers_win_over_the_host_name(plane, created):
    answer = proof(
        plane,
        **{
            "Host": "localhost",
            "E2b-Sandbox-Id": created["sandboxID"],
            "E2b-Sandbox-Port": "49983",
            "X-Access-Token": created["envdAccessToken"],
        },
    )
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"E2b-Sandbox-Id": UNKNOWN},
        {"E2b-Sandbox-Port": "49983"},
        {"E2b-Sandbox-Id": UNKNOWN, "E2b-Sandbox-Port": "http"},
        {"E2b-Sandbox-Id": UNKNOWN, "E2b-Sandbox-Port": ""},
        {"E2b-Sandbox-Id": UNKNOWN, "E2b-Sandbox-Port": "70000"},
        {"E2b-Sandbox-Id": UNKNOWN, "E2b-Sandbox-Port": "0"},
        {"E2b-Sandbox-Id": UNKNOWN, "E2b-Sandbox-Port": "-1"},
        {"E2b-Sandbox-Id": "Not An Id!", "E2b-Sandbox-Port": "49983"},
        {"E2b-Sandbox-Id": "../etc", "E2b-Sandbox-Port": "49983"},
    ],
)
def test_half_or_malformed_routing_headers_are_400_text(plane, headers):
    answer = plane.get("/health", headers=headers)
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text


@pytest.mark.parametrize("port", ["049983", "+49983", "0xC33F", "49983,49983"])
def test_another_spelling_of_the_agents_port_is_no_way_around_its_guards(plane, created, port):
    """A proxy elsewhere compared ports as text: `02280` skipped its check."""
    answer = plane.post(
        "/init",
        json={"accessToken": "mine"},
        headers={"E2b-Sandbox-Id": created["sandboxID"], "E2b-Sandbox-Port": port},
    )
    assert answer.status_code in (400, 404), answer.text


# --- rule 2: the host name ---


@pytest.mark.parametrize("host", ["49983-{id}.sbx.localhost", "49983-{id}-6532622b.e2b.app", "49983-{id}-00000000.x:3002"])
def test_the_host_name_routes(plane, created, host):
    answer = proof(plane, Host=host.format(id=created["sandboxID"]), **{"X-Access-Token": created["envdAccessToken"]})
    assert answer.status_code == 200, answer.text


# --- rule 3: the token ---


def test_the_token_alone_routes(plane, created):
    """Novita's and PPIO's Python connect() send no routing headers at all."""
    assert proof(plane, **{"X-Access-Token": created["envdAccessToken"]}).status_code == 200


def test_a_dead_sandboxs_token_still_says_502(containers, plane, created):
    containers.request("DELETE", f"/sandboxes/{created['sandboxID']}")
    answer = plane.get("/health", headers={"X-Access-Token": created["envdAccessToken"]})
    assert answer.status_code == 502
    assert answer.json()["sandboxId"] == created["sandboxID"]


# --- rule 4: the signature ---


def test_a_signed_file_url_routes_by_its_signature(plane, created):
    digest = hashlib.sha256(f"/etc/passwd:read::{created['envdAccessToken']}".encode()).digest()
    signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
    answer = plane.get("/files", params={"path": "/etc/passwd", "signature": signature})
    # Whether the agent accepts signatures is the agent's; that it was asked is the proxy's.
    assert answer.status_code in (200, 401), answer.text


# --- rule 5: nothing ---


@pytest.mark.parametrize("headers", [{}, {"X-Access-Token": "nobodys"}, {"X-Access-Token": ""}, {"Host": "example.com"}])
def test_nothing_to_route_by_is_400_text(plane, headers):
    answer = plane.get("/health", headers=headers)
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("text/plain")


def test_another_sandboxs_token_opens_nothing(containers, plane, created):
    other = containers.create()
    answer = proof(
        plane,
        **{
            "E2b-Sandbox-Id": created["sandboxID"],
            "E2b-Sandbox-Port": "49983",
            "X-Access-Token": other["envdAccessToken"],
        },
    )
    assert answer.status_code == 401


# --- never let through ---


def raw_request(containers, created, method: str, target: str) -> tuple[int, bytes]:
    """As it stands: HTTP libraries clean paths."""
    url = urlsplit(containers.proxy_url)
    with socket.create_connection((url.hostname, url.port), timeout=20) as connection:
        connection.sendall(
            f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: {created['sandboxID']}\r\n"
            f"E2b-Sandbox-Port: 49983\r\nX-Access-Token: {created['envdAccessToken']}\r\n"
            "Content-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize("path", ["/init", "/upgrade", "/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse"])
def test_control_paths_are_404_json(raw, method, path):
    _, client = raw
    answer = client.request(method, path)
    assert answer.status_code == 404
    told = answer.json()
    assert (told["code"], told["path"]) == (404, path)
    assert told["message"]


@pytest.mark.parametrize(
    "target", ["//init", "/./init", "/x/../init", "/init/", "/%69nit", "/init?x=1", "/INIT/../init", "/files/..//init", "/init;x"]
)
def test_control_paths_are_404_however_they_are_spelled(containers, created, target):
    status, _ = raw_request(containers, created, "POST", target)
    assert status in (400, 404), target
    assert proof_of_life(containers, created)


@pytest.mark.parametrize("method", ["Get", "Watch", "PrepareRelease", "CommitRelease", "AbortRelease", "Explain"])
def test_the_activity_service_is_not_reachable(containers, created, method):
    status, _ = raw_request(containers, created, "POST", f"/activity.v1.Activity/{method}")
    assert status == 404
    assert proof_of_life(containers, created)


def test_a_tunnel_is_not_opened_for_a_client(containers, created):
    status, _ = raw_request(containers, created, "CONNECT", "127.0.0.1:49983")
    assert 400 <= status < 500
    assert proof_of_life(containers, created)


def proof_of_life(containers, created) -> bool:
    with containers.plane(created) as client:
        return client.post("/process.Process/List", json={}).status_code == 200


def test_a_control_credential_from_outside_is_not_passed_on(raw):
    created, client = raw
    answer = client.post("/process.Process/List", json={}, headers={"X-Guestd-Control": "guess"})
    assert answer.status_code == 200
