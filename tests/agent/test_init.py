"""POST /init: what a host sets at the start and after each resume, and what it is told."""

import base64
import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness.connect import Stream, call, connect, open_stream, process, start
from harness.guestd import Guestd


def certificate(seed: int) -> str:
    """The outer form of a certificate: one DER sequence in another."""
    der = bytes([0x30, 0x81, 0x84, 0x30, 0x81, 0x81]) + bytes([seed]) * 0x81
    lines = base64.encodebytes(der).decode().replace("\n", "")
    body = "\n".join(lines[i : i + 64] for i in range(0, len(lines), 64))
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"


@pytest.fixture
def rooted(tmp_path):
    """An agent that writes names and certificates below a folder of the test's: `(client, folder)`."""
    (tmp_path / "etc/ssl/certs").mkdir(parents=True)
    (tmp_path / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (tmp_path / "etc/ssl/certs/ca-certificates.crt").write_text("# the machine's own\n")
    agent = Guestd("--root", str(tmp_path)).start()
    try:
        with agent.client() as client:
            yield client, tmp_path
    finally:
        agent.close()


def wait_for(what, within=5):
    deadline = time.monotonic() + within
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_empty_body_is_an_init(agent):
    answer = agent.post("/init")
    assert answer.status_code == 204
    assert answer.headers["x-envd-version"] and answer.headers["cache-control"] == "no-store"
    assert json.loads(answer.headers["x-envd-defaults"]) == {"user": "root", "fallback": True}
    assert {"online", "possible", "target"} <= set(json.loads(answer.headers["x-envd-cpus"]))
    assert answer.headers["x-envd-init-unobserved"] == "0"
    assert "x-envd-freeze-audit" not in answer.headers and "x-envd-thaw" not in answer.headers


def test_every_answer_names_the_version(agent):
    assert agent.post("/init", content=b"{").headers["x-envd-version"]
    agent.post("/init", json={"accessToken": "t"})
    refused = agent.post("/init", json={"accessToken": "x"})
    assert (refused.status_code, refused.text) == (401, "access token validation failed")
    assert refused.headers["x-envd-version"]
    assert agent.post("/init", json={}).text == "access token reset not authorized"


@pytest.mark.parametrize(
    "body, names",
    [
        (b"{", "/init body"),
        (b"[]", "/init body"),
        (b'{"accessToken": ""}', "accessToken"),
        (b'{"accessToken": "a\\u0062c"}', "accessToken"),
        (b'{"timestamp": "yesterday"}', "timestamp"),
        (b'{"envVars": {"A=B": "x"}}', "envVars"),
        (b'{"envVars": {"": "x"}}', "envVars"),
        (b'{"hyperloopIP": "gateway"}', "hyperloopIP"),
        (b'{"caBundle": "trust me"}', "caBundle"),
        (b'{"volumeMounts": [{"nfs_target": "server:/x", "path": "/mnt/x"}]}', "nfs_target"),
        (b'{"volumeMounts": [{"nfs_target": "192.0.2.1:/x", "path": "../x"}]}', "path"),
        (b'{"entropy": "???"}', "entropy"),
    ],
)
def test_a_bad_field_is_named_and_nothing_is_changed(agent, body, names):
    assert agent.post("/init", json={"envVars": {"KEPT": "yes"}}).status_code == 204
    answer = agent.post("/init", content=body)
    assert answer.status_code == 400 and names in answer.text, answer.text
    assert agent.get("/envs").json()["KEPT"] == "yes"


def test_a_body_that_is_too_large_is_413_and_a_large_one_is_taken(agent):
    assert agent.post("/init", content=b'{"envVars":{"A":"' + b"x" * (1 << 20) + b'"}}').status_code == 413
    assert agent.post("/init", content=b'{"envVars":{"A":"' + b"x" * (1 << 19) + b'"}}').status_code == 204


def test_environment_rules(agent):
    agent.post("/init", json={"envVars": {"A": "1", "B": "2", "E2B_SANDBOX": "forged"}, "sandboxID": "sid"})
    envs = agent.get("/envs").json()
    assert (envs["A"], envs["E2B_SANDBOX"], envs["E2B_SANDBOX_ID"]) == ("1", "false", "sid"), "internal ones are protected"
    for unchanged in ({}, {"envVars": None}):
        agent.post("/init", json=unchanged)
        assert agent.get("/envs").json()["B"] == "2"
    agent.post("/init", json={"envVars": {"C": "3"}})
    envs = agent.get("/envs").json()
    assert "A" not in envs and envs["C"] == "3" and envs["E2B_SANDBOX_ID"] == "sid", "the map replaces all"
    assert start(agent, "/bin/sh", "-c", "echo $C$E2B_SANDBOX_ID").stdout == b"3sid\n"


def test_an_older_init_changes_nothing_and_is_no_error(agent):
    agent.post("/init", json={"envVars": {"A": "new"}, "timestamp": "2020-01-01T00:00:10Z"})
    answer = agent.post("/init", json={"envVars": {"A": "old"}, "timestamp": "2020-01-01T00:00:09Z"})
    assert answer.status_code == 204
    assert answer.headers["x-envd-init-clock-correction"].isdigit()
    assert agent.get("/envs").json()["A"] == "new"


def test_default_user_and_workdir_hold_for_commands(agent, tmp_path):
    (tmp_path / "work").mkdir()
    tmp_path.chmod(0o755)
    answer = agent.post("/init", json={"defaultUser": "root", "defaultWorkdir": str(tmp_path / "work")})
    told = json.loads(answer.headers["x-envd-defaults"])
    assert told == {"user": "root", "workdir": str(tmp_path / "work"), "fallback": False}
    assert start(agent, "/bin/pwd").stdout.decode().strip() == str(tmp_path / "work")
    agent.post("/init", json={"defaultUser": "", "defaultWorkdir": ""})
    assert start(agent, "/bin/pwd").stdout.decode().strip() == str(tmp_path / "work"), "empty leaves it"


def test_a_ca_bundle_is_trusted_at_once_and_the_next_replaces_it(rooted):
    client, root = rooted
    store = root / "etc/ssl/certs/ca-certificates.crt"
    for seed in (1, 1, 2):
        assert client.post("/init", json={"caBundle": certificate(seed)}).status_code == 204
        assert store.read_text() == "# the machine's own\n" + certificate(seed)
    assert (root / "usr/local/share/ca-certificates/e2b-ca.crt").read_text() == certificate(2)
    client.post("/init", json={})
    assert certificate(2) in store.read_text(), "absent leaves it"


def test_a_ca_bundle_that_cannot_be_installed_is_400_with_the_reason(rooted):
    client, root = rooted
    store = root / "etc/ssl/certs/ca-certificates.crt"
    store.unlink()
    store.mkdir()
    answer = client.post("/init", json={"caBundle": certificate(1), "envVars": {"A": "set"}})
    assert answer.status_code == 400 and "caBundle" in answer.text
    assert client.get("/envs").json()["A"] == "set", "what comes before it in the order is set"


def test_the_event_gateway_is_found_by_name(rooted):
    client, root = rooted
    for address in ("192.0.2.1", "192.0.2.2"):
        assert client.post("/init", json={"hyperloopIP": address}).status_code == 204
        assert client.get("/envs").json()["E2B_EVENTS_ADDRESS"] == f"http://{address}"
        wait_for(lambda address=address: f"{address} events.e2b.local" in (root / "etc/hosts").read_text())
    assert (root / "etc/hosts").read_text() == "127.0.0.1 localhost\n192.0.2.2 events.e2b.local\n"


def test_a_volume_that_cannot_be_mounted_is_400_and_quick(agent, tmp_path):
    """Nothing listens on that address of this machine; a kernel without NFS says so as well."""
    mount = {"nfs_target": "127.0.0.9:/export", "path": str(tmp_path / "volume")}
    started = time.monotonic()
    answer = agent.post("/init", json={"volumeMounts": [mount]})
    assert answer.status_code == 400 and "volumeMounts" in answer.text
    assert time.monotonic() - started < 15
    assert agent.get("/health").status_code == 204


def test_processors_of_somebody_elses_machine_are_left_alone(agent):
    told = json.loads(agent.post("/init", json={"cpuCount": 1}).headers["x-envd-cpus"])
    assert "not the agent's" in told["rejected"]


def test_metrics_have_the_fields_of_all_versions(agent):
    metrics = agent.get("/metrics").json()
    for name in ("ts", "cpu_count", "cpu_used_pct", "mem_total", "mem_used", "mem_cache", "mem_total_mib", "mem_used_mib",
                 "disk_total", "disk_used", "cpu_possible", "cpu_target", "cpu_target_attempts", "cpu_write_pending_ms"):
        assert metrics[name] >= 0, name
    assert isinstance(metrics["oom_kills"], list)


def test_many_impatient_inits_leave_one_state(guestd):
    """A host tries again every few milliseconds and hangs up in between."""
    body = json.dumps({"envVars": {"A": "b"}, "accessToken": "t"}).encode()
    request = b"POST /init HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", guestd.port)) as connection:
            connection.sendall(request)
    with guestd.client() as client:
        answer = client.post("/init", json={"envVars": {"A": "b"}, "accessToken": "t"})
        assert answer.status_code == 204
        assert client.get("/envs", headers={"X-Access-Token": "t"}).json()["A"] == "b"


# --- restored from a snapshot ---


def test_another_lifecycle_cuts_stale_connections_and_commands_live_on(guestd):
    with guestd.client() as host, guestd.client() as stale:
        assert host.post("/init", json={"lifecycleID": "first"}).status_code == 204
        message = {"process": process("/bin/bash", "-c", "echo up; read line; echo $line"), "tag": "survivor", "stdin": True}
        with open_stream(stale, "process.Process/Start", message) as response:
            stream = Stream(response)
            stream.until("data")
            # The same life: nothing happens to it.
            assert host.post("/init", json={"lifecycleID": "first"}).status_code == 204
            assert host.post("/init", json={}).status_code == 204
            assert [p["tag"] for p in call(host, "process.Process/List").json()["processes"]] == ["survivor"]
            assert host.post("/init", json={"lifecycleID": "second"}).status_code == 204
            with pytest.raises(Exception, match="closed|peer|incomplete|disconnect"):
                stream.rest()
        # The connection that brought the news is served on.
        assert host.get("/health").status_code == 204
    with guestd.client() as fresh:
        processes = call(fresh, "process.Process/List").json()["processes"]
        assert [p["tag"] for p in processes] == ["survivor"]
        joined = []
        follower = threading.Thread(target=lambda: joined.append(connect(guestd.client(), tag="survivor")))
        follower.start()
        time.sleep(0.3)
        line = base64.b64encode(b"again\n").decode()
        call(fresh, "process.Process/SendInput", {"process": {"tag": "survivor"}, "input": {"stdin": line}})
        follower.join(10)
        assert joined and joined[0].stdout == b"again\n"


def test_a_restore_recounts_what_holds_the_machine(guestd):
    """A client that is gone with the snapshot does not keep its clone in use."""
    control = {"X-Guestd-Control": "host"}
    with guestd.client() as host, guestd.client() as stale:

        def holds() -> tuple[int, list[str]]:
            report = call(host, "activity.v1.Activity/Get", headers=control).json()
            return report.get("counting", 0), [hold["class"] for hold in report.get("holds", [])]

        host.post("/init", json={"lifecycleID": "first"}, headers=control)
        with open_stream(stale, "process.Process/Start", {"process": process("/bin/sleep", "60"), "tag": "s"}) as response:
            stream = Stream(response)
            stream.until("start")
            assert holds() == (1, ["command"])
            host.post("/init", json={"lifecycleID": "second"}, headers=control)
            wait_for(lambda: holds() == (0, ["detached"]))
        call(host, "process.Process/SendSignal", {"process": {"tag": "s"}, "signal": "SIGNAL_SIGKILL"})


def test_a_restore_cuts_tunnels(guestd):
    """What was tunnelled through a connection ends with it."""
    control = {"X-Guestd-Control": "host"}
    with socket.create_server(("127.0.0.1", 0)) as server, guestd.client() as host:
        assert host.post("/init", json={"lifecycleID": "first"}, headers=control).status_code == 204
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", guestd.port), timeout=10) as tunnel:
            target = f"127.0.0.1:{port}"
            tunnel.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nX-Guestd-Control: host\r\n\r\n".encode())
            inside, _ = server.accept()
            with inside:
                assert tunnel.recv(4096).startswith(b"HTTP/1.1 200")
                inside.sendall(b"through")
                assert tunnel.recv(4096) == b"through"
                assert host.post("/init", json={"lifecycleID": "second"}, headers=control).status_code == 204
                assert tunnel.recv(4096) == b""


# --- Firecracker's metadata service ---


class Metadata(BaseHTTPRequestHandler):
    document: dict = {}

    def answer(self, body: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        assert self.path == "/latest/api/token" and self.headers["X-metadata-token-ttl-seconds"] == "60"
        self.answer(b"session-token")

    def do_GET(self):
        assert self.headers["X-metadata-token"] == "session-token"
        self.answer(json.dumps(self.document).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_metadata_service_names_the_sandbox_and_vouches_for_tokens(metadata):
    def hashed(token):
        return hashlib.sha512(token.encode()).hexdigest()

    Metadata.document = {"instanceID": "from-mmds", "envID": "template", "address": "", "accessTokenHash": hashed("right")}
    agent = Guestd(f"--mmds={metadata}").start()
    try:
        with agent.client() as client:
            assert client.post("/init", json={"accessToken": "wrong"}).status_code == 401
            assert client.post("/init", json={}).status_code == 401
            assert client.post("/init", json={"accessToken": "right"}).status_code == 204
            token = {"X-Access-Token": "right"}
            wait_for(lambda: client.get("/envs", headers=token).json().get("E2B_SANDBOX_ID") == "from-mmds")
            assert client.get("/envs", headers=token).json()["E2B_TEMPLATE_ID"] == "template"
            Metadata.document["accessTokenHash"] = hashed("next")
            assert client.post("/init", json={"accessToken": "next"}).status_code == 204, "a resume with another token"
            Metadata.document["accessTokenHash"] = hashed("")
            assert client.post("/init", json={}).status_code == 204, "the hash of nothing allows a reset"
            assert client.get("/envs").status_code == 200
    finally:
        agent.close()
