"""Section 5: the access token, signatures, and what needs neither; 4.8 to 4.11: what is the host's alone."""

import base64
import hashlib
import http.client
import time

import pytest

from harness.connect import JSON_STREAM, envelope, process
from harness.planes import basic

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
TOKEN = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0"
GOOD = {"X-Access-Token": TOKEN}
REFUSED = "unauthorized access, please provide a valid access token or method signing if supported"
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def secured(fresh):
    answer = fresh.http.post("/init", json={"accessToken": TOKEN, "defaultUser": "user"})
    assert answer.status_code == 204, answer.text
    return fresh


def sign(path: str, operation: str, user: str = "", token: str = TOKEN, expires: int | None = None) -> dict:
    text = f"{path}:{operation}:{user}:{token}" + (f":{expires}" if expires is not None else "")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
    return {"signature": f"v1_{digest}", **({"signature_expiration": str(expires)} if expires is not None else {})}


def refused(answer, message: str) -> None:
    assert answer.status_code == 401, answer.text
    assert answer.json() == {"code": 401, "message": message}


ROUTES = [
    ("POST", "/process.Process/List"),
    ("POST", "/process.Process/Start"),
    ("POST", "/process.Process/Connect"),
    ("POST", "/process.Process/SendInput"),
    ("POST", "/process.Process/StreamInput"),
    ("POST", "/filesystem.Filesystem/Stat"),
    ("POST", "/filesystem.Filesystem/Remove"),
    ("POST", "/filesystem.Filesystem/WatchDir"),
    ("POST", "/filesystem.Filesystem/CreateWatcher"),
    ("POST", "/files/compose"),
    ("GET", "/envs"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(
    "token", [None, "", "wrong", TOKEN[:-1], f"{TOKEN}x", TOKEN.lower()], ids=["none", "empty", "wrong", "short", "long", "case"]
)
@pytest.mark.parametrize("verb, path", ROUTES, ids=[path for _, path in ROUTES])
@contract("5/token", "5/failure")
def test_without_the_token_a_call_is_refused_in_the_contracts_words(secured_once, verb, path, token):
    headers = {} if token is None else {"X-Access-Token": token}
    refused(secured_once.http.request(verb, path, headers=headers, json={} if verb == "POST" else None), REFUSED)


@pytest.fixture(scope="module")
def secured_once(accounts):
    """One secured agent for the many cases that change nothing."""
    from harness.guestd import Guestd
    from harness.planes import Plane

    agent = Guestd(wrapper=accounts.wrapper).start()
    made = Plane("alone", agent.url, guestd=agent)
    assert made.http.post("/init", json={"accessToken": TOKEN, "defaultUser": "user"}).status_code == 204
    yield made
    made.close()
    agent.close()


@pytest.mark.through_hostd(only=True)
@pytest.mark.parametrize("verb, path", ROUTES, ids=[path for _, path in ROUTES])
@contract("5/token", "5/failure")
def test_through_hostd_too_the_token_is_asked_for(plane, verb, path):
    """hostd may refuse by itself; whoever does it, the SDK has to see a 401."""
    answer = plane.http.request(verb, path, headers={"X-Access-Token": "wrong"}, json={} if verb == "POST" else None)
    assert answer.status_code == 401
    assert answer.json()["message"]


@contract("5/token", "5/failure")
def test_a_refused_start_runs_nothing(secured, tmp_path):
    body = envelope({"process": process("/usr/bin/touch", f"{tmp_path}/ran")})
    refused(secured.http.post("/process.Process/Start", content=body, headers={"Content-Type": JSON_STREAM}), REFUSED)
    assert not (tmp_path / "ran").exists()


@contract("5/token")
@pytest.mark.parametrize("verb, path", [("POST", "/process.Process/List"), ("GET", "/envs"), ("GET", "/metrics")])
def test_with_the_token_a_call_is_answered(secured_once, verb, path):
    assert secured_once.http.request(verb, path, headers=GOOD, json={} if verb == "POST" else None).status_code == 200


@contract("5/open")
@pytest.mark.parametrize(
    "verb, path", [("POST", "/process.Process/List"), ("GET", "/envs"), ("GET", "/metrics"), ("GET", "/files?path=/etc/hostname")]
)
@pytest.mark.parametrize("token", [None, "anything"])
def test_before_a_token_is_set_everything_is_open(fresh_once, verb, path, token):
    headers = {} if token is None else {"X-Access-Token": token}
    assert fresh_once.http.request(verb, path, headers=headers, json={} if verb == "POST" else None).status_code == 200


@pytest.fixture(scope="module")
def fresh_once(accounts):
    from harness.guestd import Guestd
    from harness.planes import Plane

    agent = Guestd(wrapper=accounts.wrapper).start()
    made = Plane("alone", agent.url, guestd=agent)
    yield made
    made.close()
    agent.close()


@contract("5/exempt", "4/health")
def test_health_is_answered_without_a_token(secured_once):
    answer = secured_once.http.get("/health")
    assert (answer.status_code, answer.content, answer.headers["cache-control"]) == (204, b"", "no-store")


@contract("5/basic")
def test_a_user_is_no_token(secured_once):
    refused(secured_once.http.post("/process.Process/List", json={}, headers=basic("root")), REFUSED)


# --- files: header or signature ---


@contract("5/vector", "5/signature")
def test_the_contracts_vector_is_a_valid_signature(secured_once):
    """The file is not there, which is only told to who may ask."""
    query = {"path": "hello.txt", "username": "user", "signature": "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E"}
    assert sign("hello.txt", "read", "user")["signature"] == query["signature"]
    answer = secured_once.http.get("/files", params=query)
    assert (answer.status_code, answer.json()["message"]) == (404, "path '/home/user/hello.txt' does not exist")


@contract("5/signature", "4.5/auth", "4.6/401")
@pytest.mark.parametrize("path", ["{box}/file", "file-at-home", "~/file-at-home", "with space+and:colon/ü"])
@pytest.mark.parametrize("expires", [None, 60])
def test_a_signed_url_uploads_and_downloads(secured, path, expires):
    path = path.format(box="/home/user")
    until = None if expires is None else int(time.time()) + expires
    answer = secured.http.post(
        "/files", params={"path": path, **sign(path, "write", expires=until)}, content=b"signed", headers=OCTETS
    )
    assert answer.status_code == 200, answer.text
    answer = secured.http.get("/files", params={"path": path, **sign(path, "read", expires=until)})
    assert (answer.status_code, answer.content) == (200, b"signed")


@contract("5/signature")
def test_a_signed_upload_without_a_path_names_its_file_itself(secured):
    answer = secured.http.post("/files", params=sign("", "write"), files={"file": ("named-by-part", b"x")})
    assert answer.status_code == 200, answer.text
    assert answer.json()[0]["path"] == "/home/user/named-by-part"


WRONG = {
    "another-path": ("read", {**sign("/etc/passwd", "read"), "path": "/etc/hostname"}),
    "another-operation": ("read", {**sign("/etc/hostname", "write"), "path": "/etc/hostname"}),
    "another-user": ("read", {**sign("/etc/hostname", "read", "user"), "path": "/etc/hostname"}),
    "user-not-signed": ("read", {**sign("/etc/hostname", "read"), "path": "/etc/hostname", "username": "root"}),
    "another-token": ("read", {**sign("/etc/hostname", "read", token="other"), "path": "/etc/hostname"}),
    "expiry-added": ("read", {**sign("/etc/hostname", "read"), "path": "/etc/hostname", "signature_expiration": "99999999999"}),
    "expiry-removed": (
        "read",
        {"signature": sign("/etc/hostname", "read", expires=99999999999)["signature"], "path": "/etc/hostname"},
    ),
    "padded": ("read", {"signature": sign("/etc/hostname", "read")["signature"] + "=", "path": "/etc/hostname"}),
    "version-2": (
        "read",
        {"signature": sign("/etc/hostname", "read")["signature"].replace("v1_", "v2_"), "path": "/etc/hostname"},
    ),
    "no-version": (
        "read",
        {"signature": sign("/etc/hostname", "read")["signature"].removeprefix("v1_"), "path": "/etc/hostname"},
    ),
    "empty": ("read", {"signature": "", "path": "/etc/hostname"}),
    "write-with-read": ("write", {**sign("/tmp/never", "read"), "path": "/tmp/never"}),
}


@contract("5/invalid", "4.5/auth")
@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_signature_for_something_else_is_invalid(secured_once, case):
    operation, query = WRONG[case]
    if operation == "read":
        answer = secured_once.http.get("/files", params=query)
    else:
        answer = secured_once.http.post("/files", params=query, content=b"x", headers=OCTETS)
    refused(answer, "missing signature query parameter" if case == "empty" and "missing" in answer.text else "invalid signature")


@contract("5/missing", "4.5/auth", "4.6/401")
@pytest.mark.parametrize("verb", ["GET", "POST"])
def test_neither_token_nor_signature_is_told(secured_once, verb):
    answer = secured_once.http.request(
        verb, "/files", params={"path": "/tmp/x"}, headers=OCTETS, content=b"x" if verb == "POST" else None
    )
    refused(answer, "missing signature query parameter")


@contract("5/header-first")
@pytest.mark.parametrize("verb", ["GET", "POST"])
@pytest.mark.parametrize("token", ["wrong", ""])
def test_a_wrong_header_is_refused_whatever_the_signature(secured_once, verb, token):
    query = {"path": "/tmp/never", **sign("/tmp/never", "read" if verb == "GET" else "write")}
    answer = secured_once.http.request(
        verb, "/files", params=query, headers={**OCTETS, "X-Access-Token": token}, content=b"x" if verb == "POST" else None
    )
    assert answer.status_code == 401 or token == ""
    if token:
        refused(answer, "access token present in header but does not match")


@contract("5/expired")
@pytest.mark.parametrize("verb", ["GET", "POST"])
@pytest.mark.parametrize("ago", [1, 3600])
def test_an_expired_signature_has_the_exact_body(secured_once, verb, ago):
    query = {"path": "/tmp/never", **sign("/tmp/never", "read" if verb == "GET" else "write", expires=int(time.time()) - ago)}
    answer = secured_once.http.request(verb, "/files", params=query, headers=OCTETS, content=b"x" if verb == "POST" else None)
    assert answer.status_code == 401
    assert answer.json() == {"code": 401, "message": "signature is already expired"}


@contract("5/expired")
@pytest.mark.parametrize("expiry, status", [("soon", 400), ("-1", 401), ("1e12", 400), ("", 400)])
def test_an_expiry_that_is_no_number_is_not_eternal(secured_once, expiry, status):
    text = f"/etc/hostname:read::{TOKEN}:{expiry}"
    signature = "v1_" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
    query = {"path": "/etc/hostname", "signature": signature, "signature_expiration": expiry}
    assert secured_once.http.get("/files", params=query).status_code == status


@contract("5/expired", "4/binding")
@pytest.mark.parametrize("verb", ["GET", "POST"])
@pytest.mark.parametrize("token", [None, "wrong", TOKEN])
def test_an_expiry_that_is_no_number_is_told_before_who_may(secured_once, plane, verb, token):
    query = {"path": "/tmp/never", "signature_expiration": "abc"}
    headers = {**OCTETS, **({"X-Access-Token": token} if token else {})}
    for asked in [secured_once, plane]:
        answer = asked.http.request(verb, "/files", params=query, headers=headers, content=b"x" if verb == "POST" else None)
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (400, "text/plain")
        assert "signature_expiration" in answer.text


@pytest.mark.through_hostd(only=True)
@contract("5/signature", "5/expired", "8.3/debug")
def test_a_signed_url_works_through_hostd_without_headers(plane, box):
    import httpx

    token = plane.headers["X-Access-Token"]
    path = f"{box}/file"
    routed = {name: value for name, value in plane.headers.items() if name != "X-Access-Token"}
    with httpx.Client(base_url=plane.url, headers=routed, trust_env=False, timeout=20) as client:
        query = {"path": path, **sign(path, "write", token=token)}
        assert client.post("/files", params=query, content=b"signed", headers=OCTETS).status_code == 200
        assert client.get("/files", params={"path": path, **sign(path, "read", token=token)}).content == b"signed"
        assert client.get("/files", params={"path": path, **sign(path, "read", token=token, expires=5)}).json() == {
            "code": 401,
            "message": "signature is already expired",
        }


# --- the host's alone ---

CONTROL = {
    "/freeze": "4.8/host-only",
    "/unfreeze": "4.8/host-only",
    "/fsfreeze": "4.9/host-only",
    "/fsthaw": "4.9/host-only",
    "/collapse": "4.10/host-only",
    "/upgrade": "4.11/host-only",
}


@pytest.mark.parametrize("path", [pytest.param(path, marks=contract(row)) for path, row in CONTROL.items()])
@pytest.mark.parametrize(
    "credential", [{}, {"X-Guestd-Control": ""}, {"X-Guestd-Control": "guess"}], ids=["none", "empty", "guess"]
)
def test_control_is_refused_to_who_has_the_token_only(secured_once, path, credential):
    for verb in ("POST", "GET"):
        answer = secured_once.http.request(verb, path, headers={**GOOD, **credential})
        assert answer.status_code in (401, 403, 404, 405), f"{verb} {path}: {answer.status_code} {answer.text}"


@pytest.mark.through_hostd(only=True)
@pytest.mark.parametrize("path", [pytest.param(path, marks=contract(row)) for path, row in CONTROL.items()])
def test_control_does_not_pass_the_proxy_in_any_spelling(plane, path):
    bare = path.removeprefix("/")
    for spelling in (
        path,
        f"/{path}",
        f"{path}/",
        f"/.{path}",
        f"/x/..{path}",
        f"{path}?mode=legacy",
        f"{path}%2f",
        f"/%{ord(bare[0]):02x}{bare[1:]}",
        path.upper(),
    ):
        connection = http.client.HTTPConnection(*plane.address, timeout=10)
        connection.request("POST", spelling, headers={**plane.headers, "Content-Length": "0"})
        answer = connection.getresponse()
        assert answer.status in (400, 401, 403, 404), f"{spelling}: {answer.status} {answer.read()!r}"
        connection.close()
    assert plane.start("/bin/true").exit_code == 0


@pytest.mark.through_hostd(only=True)
@contract("4.3/401", "5/exempt")
def test_init_does_not_pass_the_proxy(plane):
    for headers in ({}, {"X-Guestd-Control": "guess"}):
        assert plane.http.post("/init", json={"defaultUser": "root"}, headers=headers).status_code in (401, 403, 404)
    assert plane.start("/usr/bin/id", "-un").stdout == b"user\n"
