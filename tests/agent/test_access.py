"""Who may do what: before the first /init this machine, after it only who has the token, and control only the host."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from harness.code import CodeAgent
from harness.connect import JSON_STREAM, call, envelope, process
from harness.guestd import Guestd

TOKEN = {"X-Access-Token": "secret"}


@pytest.fixture
def secured(agent):
    answer = agent.post("/init", json={"accessToken": "secret"})
    assert answer.status_code == 204, answer.text
    return agent


def test_before_init_this_machine_is_served(agent):
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


def test_a_refused_call_does_not_break_the_next_one_on_its_connection(secured):
    """A body that nobody read would close the connection under the client's next call."""
    for _ in range(50):
        assert call(secured, "process.Process/List", {"padding": "x" * 20_000}).status_code == 401
        assert secured.get("/metrics", headers=TOKEN).status_code == 200


def test_a_refused_upload_that_is_too_long_to_be_read_says_that_the_connection_ends(secured, tmp_path):
    octets = {"Content-Type": "application/octet-stream"}
    parameters = {"path": str(tmp_path / "never")}
    answer = secured.post("/files", params=parameters, content=b"x" * 100_000, headers=octets)
    assert (answer.status_code, answer.headers.get("connection")) == (401, "close")
    assert not (tmp_path / "never").exists()


def test_a_browsers_preflight_needs_no_token(secured):
    headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,x-access-token"}
    answer = secured.options("/process.Process/Start", headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-access-token" in answer.headers["access-control-allow-headers"]
    assert answer.headers["access-control-max-age"] == "7200"


# --- where a caller comes from ---


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("the network's side was not tested: this machine has no address but loopback")
        return probe.getsockname()[0]


@pytest.fixture
def listening():
    """Starts agents that listen on all addresses: `listening("--insecure-open")` gives its port."""
    agents = []

    def begin(*arguments: str) -> Guestd:
        agents.append(Guestd("--host", "0.0.0.0", *arguments).start())
        return agents[-1]

    yield begin
    for agent in agents:
        agent.close()


def test_the_network_is_closed_until_a_token_is_set(listening):
    agent = listening()
    with httpx.Client(base_url=f"http://{own_address()}:{agent.port}", trust_env=False, timeout=10) as far:
        for refused in (call(far, "process.Process/List"), far.get("/envs"), far.get("/files?path=/etc/hostname")):
            assert refused.status_code == 401
            assert refused.json()["code"] == 401 and "no access token is set" in refused.json()["message"]
        assert far.get("/health").status_code == 204
        assert far.post("/init", json={"accessToken": "theirs"}).status_code == 401, "the network does not take the agent"
        with agent.client() as near:
            assert call(near, "process.Process/List").status_code == 200
            assert near.post("/init", json={"accessToken": "secret"}).status_code == 204
        assert far.get("/envs").status_code == 401
        assert far.get("/envs", headers=TOKEN).status_code == 200


def test_insecure_open_lifts_it_and_says_so_once(listening):
    agent = listening("--insecure-open")
    with httpx.Client(base_url=f"http://{own_address()}:{agent.port}", trust_env=False, timeout=10) as far:
        for _ in range(3):
            assert call(far, "process.Process/List").status_code == 200
        assert agent.stderr().count("the network is served") == 1
        assert far.post("/init", json={"accessToken": "secret"}).status_code == 204
        assert call(far, "process.Process/List").status_code == 401, "a token closes it again"


CALL_AS = """
import encodings.idna, http.client, os, sys
uid, host, port, path, body, control, token = sys.argv[1:]
os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
connection = http.client.HTTPConnection(host, int(port), timeout=10)
headers = {"Content-Type": "application/json", "X-Guestd-Control": control, "X-Access-Token": token}
headers = {name: value for name, value in headers.items() if value}
connection.request("POST", path, body=body.encode(), headers=headers)
print(connection.getresponse().status)
"""
SOMEBODY = 65534


def call_as(
    uid: int, agent: Guestd, path: str, body: str = "{}", control: str = "", token: str = "", host: str = "127.0.0.1", port: int | None = None
) -> int:
    """The status of a call by a process of a user's."""
    command = [sys.executable, "-c", CALL_AS, str(uid), host, str(port or agent.port), path, body, control, token]
    return int(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)


@pytest.fixture
def owned(tmp_path):
    """An agent that has a machine of its own, with a folder instead of the machine's files. No test sends it a time, a name or a
    number of processors: those would be this machine's."""
    agent = Guestd("--machine", "--root", str(tmp_path))
    yield agent
    agent.close()


def test_an_ordinary_user_cannot_initialise_the_agents_own_machine(owned):
    """Its code runs beside the agent, and whoever comes first sets the credentials."""
    owned.start()
    claim = {"path": "/init", "body": '{"accessToken": "mine"}', "control": "mine"}
    assert call_as(SOMEBODY, owned, **claim) == 401
    with owned.client() as client:
        assert client.post("/freeze", headers={"X-Guestd-Control": "mine"}).status_code == 401
    assert call_as(0, owned, **claim) == 204


@pytest.mark.parametrize("control", ["", "mine"])
@pytest.mark.parametrize("body", ["{}", '{"accessToken": "mine"}', '{"defaultUser": "root"}'])
def test_an_ordinary_user_cannot_initialise_an_ordinary_service_either(guestd, agent, body, control):
    """Whoever is first is the host for good, and the host itself would be refused."""
    assert call_as(SOMEBODY, guestd, "/init", body, control) == 401
    assert agent.post("/collapse", headers={"X-Guestd-Control": "mine"}).status_code == 401
    host = {"X-Guestd-Control": "host"}
    assert agent.post("/init", json={"accessToken": "secret"}, headers=host).status_code == 204
    assert agent.post("/collapse", headers=host).status_code == 200


def test_the_control_credential_is_worth_nothing_in_an_ordinary_users_hands(guestd, agent):
    assert agent.post("/init", json={}, headers={"X-Guestd-Control": "host"}).status_code == 204
    for path in ("/collapse", "/init", "/activity.v1.Activity/Get"):
        assert call_as(SOMEBODY, guestd, path, control="host") == 401, path
        assert call_as(0, guestd, path, control="host") in (200, 204), path


def test_without_a_token_an_ordinary_user_of_this_machine_is_not_served(guestd, agent):
    """Else it starts a process as root, and makes the control calls from that."""
    calls = ["/process.Process/List", "/filesystem.Filesystem/ListDir", "/envs", "/metrics", "/files?path=/tmp/theirs", "/nowhere"]
    for path in calls:
        assert call_as(SOMEBODY, guestd, path) == 401, path
        assert call_as(0, guestd, path) != 401, path
    assert not os.path.exists("/tmp/theirs")
    assert agent.post("/init", json={"accessToken": "secret"}).status_code == 204
    for uid in (SOMEBODY, 0):
        assert call_as(uid, guestd, "/process.Process/List") == 401
        assert call_as(uid, guestd, "/process.Process/List", token="secret") == 200, "the token is worth the same to everybody"


def test_without_a_token_an_ordinary_user_has_no_code_run(tmp_path):
    """Code runs as another user, with that user's files."""
    agent = CodeAgent(tmp_path).start()
    try:
        for path in ("/execute", "/executions", "/contexts"):
            of_somebody, of_root = (call_as(uid, agent, path, "[]", port=agent.code_port) for uid in (SOMEBODY, 0))
            assert (of_somebody, of_root) == (401, 422), path
    finally:
        agent.close()


@pytest.mark.parametrize("host", ["own address", "127.0.0.1"])
def test_an_open_network_does_not_make_an_ordinary_user_the_host(listening, host):
    agent = listening("--insecure-open")
    host = own_address() if host == "own address" else host
    assert call_as(SOMEBODY, agent, "/init", control="mine", host=host) == 401
    assert call_as(0, agent, "/init", control="host", host=host) == 204
    assert call_as(SOMEBODY, agent, "/collapse", control="host", host=host) == 401


def test_an_agent_of_an_ordinary_user_is_that_users_and_roots():
    agent = Guestd(wrapper=["setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups"])
    try:
        agent.start()
        assert call_as(SOMEBODY - 1, agent, "/init", control="mine") == 401
        assert call_as(SOMEBODY, agent, "/init", control="host") == 204
        assert call_as(0, agent, "/collapse", control="host") == 200
    finally:
        agent.close()


def test_root_is_told_apart_in_each_of_many_quick_calls(guestd, agent):
    """Connections come and go while the kernel's table of them is read."""
    headers = {"X-Guestd-Control": "host", "Connection": "close"}

    def on_a_connection_of_its_own(path: str) -> int:
        with guestd.client() as client:
            return client.post(path, json={}, headers=headers).status_code

    assert on_a_connection_of_its_own("/init") == 204
    with ThreadPoolExecutor(16) as pool:
        paths = ["/init", "/activity.v1.Activity/Get"] * 100
        statuses = list(pool.map(on_a_connection_of_its_own, paths))
    assert statuses == [204, 200] * 100


def test_the_socket_of_the_link_lets_only_its_owner_in(tmp_path):
    path = tmp_path / "agent.sock"
    agent = Guestd("--unix", str(path)).start()
    try:
        assert os.stat(path).st_mode & 0o777 == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            assert call(client, "process.Process/List").status_code == 200
    finally:
        agent.close()


@pytest.mark.parametrize("method, path", [("PUT", "/files"), ("DELETE", "/files"), ("GET", "/health/"), ("GET", "/HEALTH")])
def test_only_the_exact_exempt_paths_are_open(secured, method, path):
    assert secured.request(method, path).status_code == 401
