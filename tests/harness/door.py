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
        yield read_head(raw)["x-deno-sandbox-id"]


@contextmanager
def create_raw(hostd, **config):
    """A TCP connection on which a create call was just sent."""
    with _upgrading(hostd, "/api/v3/sandboxes/create", {"x-deno-sandbox-config": config_header(config)}) as raw:
        yield raw


@contextmanager
def join_raw(hostd, sandbox_id: str):
    """A TCP connection that is a socket of the sandbox; frames are the caller's."""
    with _upgrading(hostd, f"/api/v3/sandbox/{sandbox_id}/connect", {}) as raw:
        assert read_head(raw)["x-deno-sandbox-id"] == sandbox_id
        yield raw


@contextmanager
def _upgrading(hostd, path: str, headers: dict):
    address = urlsplit(hostd.api_url)
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection((address.hostname, address.port), timeout=OPEN_TIMEOUT) as raw:
        raw.sendall(
            (
                f"GET {path} HTTP/1.1\r\n"
                f"host: {address.netloc}\r\nauthorization: Bearer {TOKEN}\r\n"
                "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
                f"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{more}\r\n"
            ).encode()
        )
        yield raw


def read_head(raw: socket.socket) -> dict[str, str]:
    """An answer's headers, to the byte: what follows is the caller's."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = raw.recv(1)
        assert byte, f"the connection ended after {head!r}"
        head += byte
    return dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
