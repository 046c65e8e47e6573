"""What the data plane says for a sandbox or a port that is not there; the SDKs read these statuses and texts."""

import pytest
from e2b import Sandbox, SandboxNotRunningException

from harness.connect import JSON_STREAM, envelope, process

BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Chrome/140.0", "Accept": "text/html,*/*"}
UNKNOWN = {"sandboxID": "i" + "0" * 20, "envdAccessToken": "none"}


def test_a_running_sandbox_is_healthy(raw):
    _, client = raw
    assert client.get("/health").status_code == 204


def test_an_unknown_sandbox_is_502_and_was_not_found(containers):
    with containers.plane(UNKNOWN) as client:
        answer = client.get("/health")
    assert answer.status_code == 502
    assert answer.headers["content-type"].startswith("application/json")
    told = {"sandboxId": UNKNOWN["sandboxID"], "message": "The sandbox was not found", "code": 502}
    assert answer.json() | told == answer.json()


def test_a_killed_sandbox_is_502_and_was_not_found_on_every_path(containers, raw):
    created, client = raw
    containers.request("DELETE", f"/sandboxes/{created['sandboxID']}")
    start = {
        "content": envelope({"process": process("/bin/true")}),
        "headers": {"Content-Type": JSON_STREAM},
    }
    for answer in (
        client.get("/health"),
        client.get("/files", params={"path": "/etc/passwd"}),
        client.post("/filesystem.Filesystem/Stat", json={"path": "/"}),
        client.post("/process.Process/Start", **start),
    ):
        assert answer.status_code == 502
        told = {"sandboxId": created["sandboxID"], "message": "The sandbox was not found", "code": 502}
        assert answer.json() | told == answer.json()


def test_a_closed_port_of_a_live_sandbox_is_502_and_names_the_port(containers):
    created = containers.create()
    with containers.plane(created, port=8081) as client:
        answer = client.get("/")
    assert answer.status_code == 502
    message = "The sandbox is running but port is not open"
    told = {"sandboxId": created["sandboxID"], "message": message, "port": 8081, "code": 502}
    assert answer.json() | told == answer.json()


@pytest.mark.parametrize("port, told", [(49983, "Sandbox Not Found"), (8081, "no service running on port")])
def test_a_browser_gets_a_page(containers, port, told):
    created = containers.create()
    if port == 49983:
        containers.request("DELETE", f"/sandboxes/{created['sandboxID']}")
    with containers.plane(created, port=port) as client:
        page = client.get("/", headers=BROWSER)
        for api_like in ({"Sec-Fetch-Mode": "cors"}, {"Accept": "application/json"}, {"X-Requested-With": "x"}):
            assert client.get("/", headers={**BROWSER, **api_like}).json()["code"] == 502
    assert page.status_code == 502
    if not page.headers["content-type"].startswith("text/html"):
        pytest.skip("browsers get JSON too: the pages of contracts/control-plane.md 3.2 do not exist yet")
    text = page.text.strip()
    assert text.startswith(("<html", "<!doctype html", "<!DOCTYPE html")) and text.endswith("</html>")
    assert created["sandboxID"] in text and told in text


def test_the_sdk_knows_a_dead_sandbox_by_type(containers):
    sandbox = Sandbox.create(**containers.sdk())
    assert sandbox.is_running() is True
    sandbox.kill()
    assert sandbox.is_running() is False
    with pytest.raises(SandboxNotRunningException):
        sandbox.commands.run("true")
    with pytest.raises(SandboxNotRunningException):
        sandbox.files.read("/etc/passwd")
    with pytest.raises(SandboxNotRunningException):
        sandbox.files.list("/")


def test_a_kill_ends_open_streams_by_type_and_at_once(containers, sandbox):
    command = sandbox.commands.run("sleep 100", background=True, timeout=0)
    sandbox.kill()
    with pytest.raises(SandboxNotRunningException):
        command.wait()


def test_an_answer_of_the_guest_passes_unchanged(raw):
    """A 404, 400 or 401 of the agent's is the agent's, not the proxy's."""
    _, client = raw
    answer = client.get("/files", params={"path": "/no/such/file"})
    assert (answer.status_code, answer.json()["code"]) == (404, 404)
    refused = client.get("/files", params={"path": "/etc/passwd"}, headers={"X-Access-Token": "wrong"})
    assert refused.status_code == 401
