"""The same doors over TLS with a wildcard certificate: every SDK by a domain alone, `run_code` and the guest's own servers included."""

import shutil
import socket
import ssl
import stat
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from harness import door, locations
from harness.hostd import TLS_DOMAIN, HostdExited
from harness.names import Names
from harness.programs import LEAVE, run_node, run_python

HERE = Path(__file__).parent
WALK = (HERE / "tls_walk.py").read_text()
JAVASCRIPT_WALK = (HERE / "tls_walk.mjs").read_text()
ANY = "127.0.0.1:0"
PYTHON_SDKS = ["e2b", "e2b_code_interpreter", "novita_sandbox.core", "novita_sandbox.code_interpreter", "ppio_sandbox.core", "ppio_sandbox.code_interpreter"]


@pytest.fixture(scope="module")
def names():
    served = Names(TLS_DOMAIN)
    yield served
    served.close()


def trusting(hostd, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=hostd.authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def handshake(hostd, name: str, *protocols: str) -> ssl.SSLSocket:
    host, port = hostd.tls_address.split(":")
    return trusting(hostd, *protocols).wrap_socket(socket.create_connection((host, int(port)), timeout=20), server_hostname=name)


def client(hostd, name: str, **options) -> httpx.Client:
    """By name; names resolve to 127.0.0.1 here."""

    class ByName(httpx.HTTPTransport):
        def handle_request(self, request):
            request.extensions["sni_hostname"] = request.url.host
            request.url = request.url.copy_with(host="127.0.0.1")
            return super().handle_request(request)

    port = hostd.tls_address.split(":")[1]
    http2 = options.pop("http2", False)
    transport = ByName(verify=trusting(hostd), http2=http2, trust_env=False)
    return httpx.Client(base_url=f"https://{name}.{TLS_DOMAIN}:{port}", transport=transport, timeout=20, **options)


# --- the SDKs ---


def require_kernels(sdk: str) -> None:
    template = locations.images() / "code-interpreter-v1"
    if "interpreter" in sdk and not template.exists():
        pytest.fail(f"{template} is missing: make it with `cargo xtask image --template {template.name} --tree`", pytrace=False)


@pytest.mark.takes(10)
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("sdk", PYTHON_SDKS)
def test_a_python_sdk_walks_through_by_its_domain_alone(containers, names, sdk, kind):
    require_kernels(sdk)
    environment = {**containers.tls_environment(), "SDK": sdk, "KIND": kind, "SERVERS": str(HERE)}
    assert run_python(WALK + LEAVE, environment, within=200, through=names.through()).endswith("walked\n")


@pytest.mark.takes(10)
@pytest.mark.parametrize("sdk", ["e2b", "@e2b/code-interpreter", "novita-sandbox", "novita-sandbox/code-interpreter"])
def test_a_javascript_sdk_walks_through_by_its_domain_alone(containers, names, sdk):
    require_kernels(sdk)
    environment = {**containers.tls_environment(), "SDK": sdk, "SERVERS": str(HERE)}
    assert run_node(JAVASCRIPT_WALK, environment, within=200, through=names.through()).endswith("walked\n")


def test_a_deno_session_containers(containers, names):
    port = containers.tls_address.split(":")[1]
    endpoint = f"https://api.{TLS_DOMAIN}:{port}"
    environment = {
        **door.environment(containers),
        "DENO_SANDBOX_ENDPOINT": endpoint,
        "DENO_DEPLOY_ENDPOINT": endpoint,
        "SSL_CERT_FILE": str(containers.authority),
    }
    source = """
from deno_sandbox import DenoDeploy
sdk = DenoDeploy()
with sdk.sandbox.create() as sandbox:
  print(sandbox.id, len(sdk.sandbox.list().items) > 0)
"""
    lasting = door.create_lasting(containers, "5m")
    printed = run_python(source, environment, within=60, through=names.through())
    assert printed.startswith("sbx_ord_") and printed.endswith(" True\n")
    with client(containers, "api") as api:
        page = api.get("/api/v3/sandboxes", params={"limit": 1}, headers={"Authorization": f"Bearer {door.TOKEN}"})
    assert page.headers["link"].startswith(f"<https://api.{TLS_DOMAIN}:")
    assert lasting in door.listed(containers)


# --- protocols and doors ---


@pytest.mark.parametrize("http2", [False, True])
def test_the_control_plane_and_the_sandboxes_share_the_listener(containers, http2):
    with client(containers, "api", http2=http2) as api:
        created = api.post("/v2/sandboxes", json={"templateID": "base"}, headers={"X-API-KEY": containers.api_key})
        assert (created.status_code, created.http_version) == (201, "HTTP/2" if http2 else "HTTP/1.1")
        assert api.get("/nonsense").json()["message"].startswith("no such route")
    told = created.json()
    with client(containers, f"49983-{told['sandboxID']}", http2=http2) as plane:
        assert plane.get("/health").status_code == 204
        assert plane.post("/process.Process/List", json={}).status_code == 401
        token = {"X-Access-Token": told["envdAccessToken"]}
        assert plane.post("/process.Process/List", json={}, headers=token).json() == {}
        # The control plane is at its own name only, and the host's own calls nowhere.
        assert plane.get("/v2/sandboxes", headers=token).status_code == 404
        assert plane.post("/init", json={}).status_code == 404
    with client(containers, "sandbox", http2=http2) as by_headers:
        routing = {"E2b-Sandbox-Id": told["sandboxID"], "E2b-Sandbox-Port": "49983"}
        assert by_headers.get("/health", headers=routing).status_code == 204
        assert by_headers.get("/health").status_code == 400
    with client(containers, f"49983-{'i' + '0' * 20}", http2=http2) as nobody:
        assert (nobody.get("/health").status_code, nobody.get("/health").json()["code"]) == (502, 502)


def test_the_client_chooses_the_protocol_and_http2_is_the_first_choice(containers):
    for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1", "h2"], "h2"), (["http/1.1"], "http/1.1"), ([], None)):
        with handshake(containers, f"api.{TLS_DOMAIN}", *offered) as stream:
            assert (stream.selected_alpn_protocol(), stream.version()) == (chosen, "TLSv1.3")


def test_the_certificate_is_for_names_of_the_domain_only(containers):
    handshake(containers, f"8000-iabc.{TLS_DOMAIN}").close()
    for other in ("example.com", f"a.b.{TLS_DOMAIN}", "localhost"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(containers, other)


def test_plain_http_is_told_to_use_tls(containers):
    answer = httpx.get(f"http://{containers.tls_address}/health", trust_env=False)
    assert (answer.status_code, "https://" in answer.text) == (400, True)


@pytest.mark.takes(10)
def test_more_commands_at_once_than_an_http2_connections_usual_streams(containers, names):
    """The E2B SDK has one such connection, with a stream for each command that it watches; servers usually allow 100 or 200."""
    source = """
import asyncio
from e2b import AsyncSandbox
async def main():
  sandbox = await AsyncSandbox.create(timeout=300)
  for _ in range(11):
    await asyncio.gather(*(sandbox.commands.run("sleep 250", background=True, timeout=0) for _ in range(20)))
  print((await sandbox.commands.run("echo still")).stdout, len(await sandbox.commands.list()))
  await sandbox.kill()
asyncio.run(main())
"""
    printed = run_python(source + LEAVE, containers.tls_environment(), within=60, through=names.through())
    assert printed.split() == ["still", "220"]


@pytest.mark.takes(12)
def test_a_handshake_that_does_not_come_is_given_up(containers):
    host, port = containers.tls_address.split(":")
    hello = bytes.fromhex("160301")
    with socket.create_connection((host, int(port))) as silent, socket.create_connection((host, int(port))) as stuck:
        stuck.sendall(hello)
        for connection in (silent, stuck):
            connection.settimeout(13)
            begun = time.monotonic()
            while connection.recv(4096):
                pass
            assert time.monotonic() - begun < 12


# --- certificates ---


def test_the_authority_outlives_a_restart_and_its_key_is_for_nobody_else(hostd):
    containers = hostd(tls_listen=ANY)
    before = containers.authority.read_bytes()
    key = containers.authority.with_name("ca.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    context = trusting(containers)
    containers.restart()
    assert containers.authority.read_bytes() == before
    host, port = containers.tls_address.split(":")
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=20), server_hostname=f"api.{TLS_DOMAIN}"):
        pass


@pytest.fixture
def openssl():
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no certificate of an operator's own was tested: openssl is not on PATH")

    def make(folder: Path, names: str, days: int = 30) -> tuple[Path, Path]:
        certificate, key = folder / "cert.pem", folder / "key.pem"
        subprocess.run(
            [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=test"]
            + ["-addext", f"subjectAltName={names}", "-days", str(days), "-keyout", key, "-out", certificate],
            check=True,
            capture_output=True,
        )
        return certificate, key

    return make


def test_an_operators_own_certificate_is_shown(hostd, openssl, tmp_path):
    certificate, key = openssl(tmp_path, "DNS:*.sandboxes.example")
    supervisor = hostd(tls_listen=ANY, tls_domain="sandboxes.example", tls_certificate=certificate, tls_key=key)
    host, port = supervisor.tls_address.split(":")
    context = ssl.create_default_context(cafile=certificate)
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=20), server_hostname="api.sandboxes.example") as stream:
        stream.sendall(b"GET /health HTTP/1.1\r\nHost: api.sandboxes.example\r\nConnection: close\r\n\r\n")
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
    assert not (supervisor.data / "tls").exists(), "no authority of its own was needed"


def test_a_certificate_that_no_client_would_take_is_refused_at_the_start(hostd, openssl, tmp_path):
    certificate, key = openssl(tmp_path, "DNS:*.sandboxes.example")
    other = tmp_path / "other"
    other.mkdir()
    _, other_key = openssl(other, "DNS:x")
    given = {"tls_listen": ANY, "tls_domain": "sandboxes.example", "tls_certificate": certificate, "tls_key": key}
    for wrong, rule in (
        ({"tls_key": other_key}, f"--tls-key {other_key}: does not belong to the first certificate of --tls-certificate"),
        ({"tls_domain": "other.example"}, "must be for *.other.example, and is for *.sandboxes.example"),
        ({"tls_certificate": key}, f"--tls-certificate {key}: must hold a certificate in PEM"),
        ({"tls_key": certificate}, f"--tls-key {certificate}: must hold a private key in PEM"),
        ({"tls_key": "/nonexistent/key.pem"}, "--tls-key /nonexistent/key.pem: No such file"),
        ({"tls_certificate": tmp_path}, f"--tls-certificate {tmp_path}: must be a file"),
    ):
        with pytest.raises(HostdExited) as ended:
            hostd(**{**given, **wrong})
        assert rule in ended.value.stderr, (wrong, ended.value.stderr)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"tls_listen": "0.0.0.0:0"}, "--tls-listen 0.0.0.0:0 can be reached by others and no --api-key is set"),
        ({"tls_listen": ANY, "tls_domain": "localhost"}, "--tls-domain"),
        ({"tls_listen": ANY, "tls_domain": "sbx.localhost:3443"}, "without a port"),
        ({"tls_listen": "nonsense"}, "--tls-listen"),
        ({"tls_domain": "sbx.localhost"}, "--tls-listen"),
        ({"tls_listen": ANY, "tls_key": "/x"}, "--tls-certificate"),
        ({"tls_listen": ANY, "tls_certificate": "/x"}, "--tls-key"),
    ],
)
def test_flags_that_make_no_sense_are_named(hostd, flags, rule):
    with pytest.raises(HostdExited) as ended:
        hostd(**flags)
    assert rule in ended.value.stderr
