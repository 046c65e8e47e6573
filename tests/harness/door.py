"""hostd's door for the Deno SDKs, as bytes: a WebSocket each (contract: deno.md section 2)."""

import base64
import json
import socket
from contextlib import contextmanager
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

TOKEN = "ddo_" + "0" * 32
# A microVM under emulation may take its time.
OPEN_TIMEOUT = 70


def environment(hostd) -> dict:
    """The three variables that a user of the SDKs sets."""
    return {
        "DENO_SANDBOX_ENDPOINT": hostd.api_url,
        "DENO_DEPLOY_ENDPOINT": hostd.api_url,
        "DENO_DEPLOY_TOKEN": TOKEN,
    }


def config_header(config: dict) -> str:
    return base64.b64encode(json.dumps(config).encode()).decode()


def create(hostd, **config) -> ClientConnection:
    """The socket of a new sandbox: a session, unless `timeout` or `stop_at_ms` says otherwise."""
    return dial(hostd, "/api/v3/sandboxes/create", {"x-deno-sandbox-config": config_header(config)})


def join(hostd, sandbox_id: str) -> ClientConnection:
    return dial(hostd, f"/api/v3/sandbox/{sandbox_id}/connect", {})


def dial(hostd, path: str, headers: dict, token: str = TOKEN) -> ClientConnection:
    return connect(
        hostd.api_url.replace("http", "ws", 1) + path,
        additional_headers={"Authorization": f"Bearer {token}", **headers},
        user_agent_header="tests",
        open_timeout=OPEN_TIMEOUT,
        ping_interval=None,
        proxy=None,
    )


def id_of(connection: ClientConnection) -> str:
    return connection.response.headers["x-deno-sandbox-id"]


def create_lasting(hostd, timeout: str, **config) -> str:
    """A sandbox that outlives its client, which has gone already."""
    with create(hostd, timeout=timeout, **config) as connection:
        return id_of(connection)


def listed(hostd, **params) -> dict[str, dict]:
    answer = hostd.request("GET", "/api/v3/sandboxes", params=params)
    assert answer.status_code == 200, answer.text
    return {entry["id"]: entry for entry in answer.json()}


@contextmanager
def silent_client(hostd, **config):
    """A client that says nothing after its handshake, not even to pings; gives the sandbox's id."""
    with create_raw(hostd, **config) as raw:
        head = b""
        while b"\r\n\r\n" not in head:
            head += raw.recv(4096)
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n\r\n")[0].split("\r\n")[1:])
        yield headers["x-deno-sandbox-id"]


@contextmanager
def create_raw(hostd, **config):
    """A TCP connection on which a create call was just sent."""
    address = urlsplit(hostd.api_url)
    with socket.create_connection((address.hostname, address.port), timeout=OPEN_TIMEOUT) as raw:
        raw.sendall(
            (
                "GET /api/v3/sandboxes/create HTTP/1.1\r\n"
                f"host: {address.netloc}\r\nauthorization: Bearer {TOKEN}\r\n"
                "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
                "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                f"x-deno-sandbox-config: {config_header(config)}\r\n\r\n"
            ).encode()
        )
        yield raw
