"""An answer that comes before its request is over, to a client that goes on sending: it arrives all the same."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

MIB = 1 << 20
# The server has answered and closed when the rest is sent.
PAUSE = 0.3
TIMES = 10


def upload(url: str, path: str, headers: dict, size: int = 12 * MIB) -> tuple[int, bytes]:
    """Status and body, read only when all is sent."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as raw:
        head = {"Host": address.netloc, "Content-Length": size, "Content-Type": "application/json", **headers}
        raw.sendall(f"POST {path} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in head.items()) + b"\r\n")
        for _ in range(size // MIB):
            raw.sendall(b" " * MIB)
            time.sleep(PAUSE if _ == 0 else 0)
        answer = raw.makefile("rb")
        status = int(answer.readline().split()[1])
        length = 0
        while (line := answer.readline()) != b"\r\n":
            name, _, value = line.decode().partition(":")
            length = int(value) if name.lower() == "content-length" else length
        return status, answer.read(length)


def always(url: str, path: str, headers: dict) -> tuple[int, dict | str]:
    """The same answer to many such clients at once."""
    with ThreadPoolExecutor(TIMES) as threads:
        answers = set(threads.map(lambda _: upload(url, path, headers), range(TIMES)))
    assert len(answers) == 1, answers
    status, body = answers.pop()
    return status, json.loads(body)


def test_a_body_too_large_for_the_api_is_told_so(containers):
    status, told = always(containers.api_url, "/sandboxes", {"X-API-KEY": containers.api_key})
    assert (status, told["code"]) == (413, 413)


def test_a_body_that_the_deno_door_does_not_take_is_told_so(containers):
    status, told = always(containers.api_url, "/api/v3/sandboxes/create", {"Authorization": "Bearer ddo_x"})
    assert status == 405 and told["code"] == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize("path", ["/sandboxes", "/api/v3/sandbox/sbx_ord_00000000000000000000/expose/http"])
def test_a_wrong_key_is_told_so(hostd, path):
    supervisor = hostd("container", api_key="the right one")
    status, _ = always(supervisor.api_url, path, {"X-API-KEY": "a wrong one"})
    assert status == 401


def test_an_upload_with_a_wrong_token_is_told_so(containers):
    created = containers.create()
    routing = {"E2b-Sandbox-Id": created["sandboxID"], "E2b-Sandbox-Port": 49983, "X-Access-Token": "wrong"}
    status, told = always(containers.proxy_url, "/files?path=/tmp/x", routing)
    assert (status, told["code"]) == (401, 401)


def test_an_upload_to_an_ended_sandbox_is_told_so(containers):
    routing = {"E2b-Sandbox-Id": "i" + "0" * 20, "E2b-Sandbox-Port": 49983}
    status, told = always(containers.proxy_url, "/files?path=/tmp/x", routing)
    assert (status, told["code"]) == (502, 502)
