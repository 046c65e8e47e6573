"""Sections 4 to 4.4: health, CORS, metrics, init, environment."""

import json
import os
import re
import subprocess
import time
from datetime import datetime, timedelta, timezone

import pytest

from harness import locations

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
FIRST = "first-token"


def init(plane, body: dict | bytes | None = None, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    return plane.http.post("/init", content=content, headers={"Content-Type": "application/json", **headers})


def envs(plane, token: str | None = None) -> dict:
    return plane.http.get("/envs", headers={"X-Access-Token": token} if token else {}).json()


# --- health, unknown paths, methods ---


@hosted
@contract("4/health")
def test_health_is_204_and_not_to_be_kept(plane):
    answer = plane.http.get("/health")
    assert (answer.status_code, answer.content, answer.headers["cache-control"]) == (204, b"", "no-store")


@pytest.mark.parametrize(
    "verb, path",
    [
        ("POST", "/health"),
        ("HEAD", "/health"),
        ("POST", "/metrics"),
        ("HEAD", "/metrics"),
        ("PUT", "/envs"),
        ("GET", "/init"),
        ("PUT", "/init"),
        ("HEAD", "/files"),
        ("GET", "/files/compose"),
    ],
)
@contract("4/wrong-method")
def test_another_method_is_405(plane, verb, path):
    assert plane.http.request(verb, path).status_code == 405


@hosted
@contract("4/unknown-path")
@pytest.mark.parametrize("path", ["/", "/healthz", "/health/", "/Files", "/files/", "/files/other", "/favicon.ico"])
def test_an_unknown_path_is_404(plane, path):
    assert plane.http.get(path).status_code == 404


# --- CORS ---


@pytest.mark.parametrize("path", ["/process.Process/Start", "/filesystem.Filesystem/Stat", "/files", "/health", "/envs"])
@contract("4.1/preflight", "4.1/headers")
def test_a_preflight_is_answered_before_any_token(fresh, path):
    assert init(fresh, {"accessToken": FIRST}).status_code == 204
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,connect-protocol-version,x-access-token,keepalive-ping-interval",
    }
    answer = fresh.http.options(path, headers=asked)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "*"
    allowed = {word.strip().upper() for word in answer.headers["access-control-allow-methods"].split(",")}
    assert "POST" in allowed
    assert answer.headers["access-control-max-age"] == "7200"
    headers = {word.strip().lower() for word in answer.headers["access-control-allow-headers"].split(",")}
    assert "*" in headers or {"content-type", "connect-protocol-version", "x-access-token", "keepalive-ping-interval"} <= headers


@contract("4.1/headers")
@pytest.mark.parametrize("method", ["HEAD", "GET", "POST", "PUT", "PATCH", "DELETE"])
def test_every_method_is_allowed_across_origins(plane, method):
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": method}
    answer = plane.http.options("/files", headers=asked)
    allowed = {word.strip().upper() for word in answer.headers["access-control-allow-methods"].split(",")}
    assert method in allowed or "*" in allowed


@hosted
@contract("4.1/headers")
@pytest.mark.parametrize(
    "verb, path",
    [("GET", "/health"), ("GET", "/files?path=/no/such"), ("POST", "/process.Process/List"), ("POST", "/process.Process/Start")],
)
def test_an_answer_may_be_read_across_origins(plane, verb, path):
    answer = plane.http.request(verb, path, headers={"Origin": "https://app.example"}, json={} if verb == "POST" else None)
    assert answer.headers["access-control-allow-origin"] == "*"
    exposed = {word.strip().lower() for word in answer.headers["access-control-expose-headers"].split(",")}
    wanted = {"grpc-status", "grpc-message", "grpc-status-details-bin", "location", "cache-control", "x-content-type-options"}
    assert wanted <= exposed or "*" in exposed


@contract("4.1/headers", "5/failure")
def test_a_refusal_may_be_read_across_origins(fresh):
    assert init(fresh, {"accessToken": FIRST}).status_code == 204
    answer = fresh.http.get("/envs", headers={"Origin": "https://app.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "*")


# --- metrics ---


@hosted
@contract("4.2/metrics", "4.2/no-store")
def test_metrics_tell_the_machine(plane):
    answer = plane.http.get("/metrics")
    assert answer.headers["cache-control"] == "no-store"
    told = answer.json()
    wanted = {
        "ts",
        "cpu_count",
        "cpu_used_pct",
        "mem_total",
        "mem_used",
        "mem_cache",
        "mem_total_mib",
        "mem_used_mib",
        "disk_total",
        "disk_used",
    }
    assert wanted <= set(told)
    assert abs(told["ts"] - int(plane.sh("date +%s"))) <= 2
    assert told["cpu_count"] == int(plane.sh("nproc --all"))
    assert told["mem_total"] == int(plane.sh("awk '/^MemTotal/ {print $2}' /proc/meminfo")) * 1024
    assert told["mem_total_mib"] == told["mem_total"] // (1 << 20)
    assert told["mem_used_mib"] == told["mem_used"] // (1 << 20)
    assert 0 < told["mem_used"] < told["mem_total"]
    size, free = map(int, plane.sh("stat -f -c '%b %a' /").split())
    block = int(plane.sh("stat -f -c %S /"))
    assert told["disk_total"] == size * block
    assert told["disk_used"] == pytest.approx((size - free) * block, rel=0.2, abs=1 << 26)


@contract("4.2/metrics")
def test_the_cpu_is_busy_when_it_is(plane):
    plane.http.get("/metrics")
    plane.sh("timeout 0.6 sh -c 'while :; do :; done' & timeout 0.6 sh -c 'while :; do :; done'; true")
    used = plane.http.get("/metrics").json()["cpu_used_pct"]
    assert 100 / os.cpu_count() * 0.5 < used <= 100
    assert round(used, 2) == used


# --- init ---


@contract("4.3/empty", "4.3/headers", "0/version")
@pytest.mark.parametrize("body", [None, b"", b"{}", b"  {} ", b'{"ofTheFuture": [1]}'])
def test_an_empty_init_is_accepted_and_tells_the_version(fresh, body):
    answer = init(fresh, body)
    assert (answer.status_code, answer.content, answer.headers["cache-control"]) == (204, b"", "no-store")
    assert re.fullmatch(r"\d+\.\d+\.\d+", answer.headers["x-envd-version"])


@contract("0/version", "8.1/gates")
def test_the_version_is_plain_and_opens_every_gate(fresh):
    told = subprocess.run([str(locations.guestd()), "--version"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", told)
    assert init(fresh).headers["x-envd-version"] == told.strip()
    assert (0, 6, 4) <= tuple(map(int, told.split("."))) < (0, 9, 0)


@contract("4.3/400", "4.3/headers")
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"5",
        b'{"envVars": []}',
        b'{"envVars": {"A": 1}}',
        b'{"accessToken": 5}',
        b'{"defaultUser": {}}',
        b'{"timestamp": "soon"}',
        b'{"timestamp": 5}',
        b"\xff",
    ],
)
def test_an_init_that_is_none_is_400_and_changes_nothing(fresh, body):
    assert init(fresh, {"envVars": {"A": "1"}}).status_code == 204
    answer = init(fresh, body)
    assert answer.status_code == 400
    assert "x-envd-version" in answer.headers
    assert envs(fresh)["A"] == "1"


@contract("4.3/env", "4.4/envs")
def test_variables_are_replaced_as_a_whole_and_kept_when_absent(fresh):
    assert init(fresh, {"envVars": {"A": "1", "B": "2"}}).status_code == 204
    assert {name: value for name, value in envs(fresh).items() if not name.startswith("E2B_")} == {"A": "1", "B": "2"}
    for keeps in ({}, {"envVars": None}, {"defaultUser": "user"}):
        assert init(fresh, keeps).status_code == 204
        assert envs(fresh)["A"] == "1"
    assert init(fresh, {"envVars": {"C": "ünï \n"}}).status_code == 204
    assert {name: value for name, value in envs(fresh).items() if not name.startswith("E2B_")} == {"C": "ünï \n"}
    assert init(fresh, {"envVars": {}}).status_code == 204
    assert [name for name in envs(fresh) if not name.startswith("E2B_")] == []


@contract("4.3/protected", "2.3/sandbox")
def test_the_sandboxs_own_variables_cannot_be_replaced(fresh):
    before = envs(fresh)
    assert before["E2B_SANDBOX"] == "false"
    assert (
        init(
            fresh, {"envVars": {"E2B_SANDBOX": "mine", "E2B_SANDBOX_ID": "mine", "E2B_TEMPLATE_ID": "mine", "A": "1"}}
        ).status_code
        == 204
    )
    told = envs(fresh)
    assert told["A"] == "1"
    assert told["E2B_SANDBOX"] == "false"
    assert before.get("E2B_SANDBOX_ID") == told.get("E2B_SANDBOX_ID")
    assert "mine" not in told.values()


@hosted
@contract("4.4/envs")
def test_the_environment_is_an_object_of_strings(plane):
    answer = plane.http.get("/envs")
    assert answer.headers["content-type"].startswith("application/json")
    told = answer.json()
    assert all(isinstance(name, str) and isinstance(value, str) for name, value in told.items())
    assert told["E2B_SANDBOX"] == ("true" if plane.sandbox_id else "false")


@contract("4.3/token", "4.3/401")
def test_a_token_is_set_kept_and_never_taken_over(fresh):
    assert init(fresh, {"accessToken": FIRST}).status_code == 204
    answer = init(fresh, {"accessToken": "second"})
    assert (answer.status_code, answer.text) == (401, "access token validation failed")
    for body in (None, {}, {"accessToken": None}, {"envVars": {"A": "1"}}):
        answer = init(fresh, body)
        assert (answer.status_code, answer.text) == (401, "access token reset not authorized")
    assert init(fresh, {"accessToken": FIRST, "envVars": {"A": "1"}}).status_code == 204
    assert envs(fresh, FIRST)["A"] == "1"


@contract("4.3/401")
def test_a_refused_init_applies_nothing(fresh):
    assert init(fresh, {"accessToken": FIRST, "defaultUser": "user", "envVars": {"A": "1"}}).status_code == 204
    assert (
        init(fresh, {"accessToken": "x", "defaultUser": "root", "envVars": {"A": "2"}, "defaultWorkdir": "/"}).status_code == 401
    )
    assert envs(fresh, FIRST)["A"] == "1"
    assert fresh.start("/bin/sh", "-c", "id -un; pwd", headers={"X-Access-Token": FIRST}).stdout == b"user\n/home/user\n"


@contract("4.3/token-form")
@pytest.mark.parametrize("body", [b'{"accessToken": ""}', b'{"accessToken": "a\\nb"}', b'{"accessToken": "\\u0061"}'])
def test_a_token_that_is_empty_or_escaped_is_400(fresh, body):
    answer = init(fresh, body)
    assert answer.status_code == 400
    assert fresh.process("List").status == 200, "no token was set"


@contract("4.3/user", "0/default-user")
def test_an_empty_name_leaves_the_user_and_the_folder(fresh):
    assert init(fresh, {"defaultUser": "user", "defaultWorkdir": "/usr"}).status_code == 204
    assert init(fresh, {"defaultUser": "", "defaultWorkdir": ""}).status_code == 204
    assert fresh.start("/bin/sh", "-c", "id -un; pwd").stdout == b"user\n/usr\n"


def stamp(seconds: float) -> str:
    """A time beside now: within 50 ms behind and 5 s ahead no clock is set."""
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


@contract("4.3/timestamp")
def test_an_older_init_is_accepted_and_applies_nothing(fresh):
    newer, older = stamp(0), stamp(-1)
    assert init(fresh, {"timestamp": newer, "envVars": {"A": "new"}}).status_code == 204
    assert init(fresh, {"timestamp": older, "envVars": {"A": "old"}, "defaultUser": "user"}).status_code == 204
    assert envs(fresh)["A"] == "new"
    assert fresh.start("/usr/bin/id", "-un", cwd="/").stdout == b"root\n"
    assert init(fresh, {"timestamp": newer, "envVars": {"A": "equal"}}).status_code == 204
    assert envs(fresh)["A"] == "equal"
    assert init(fresh, {"envVars": {"A": "absent"}}).status_code == 204
    assert envs(fresh)["A"] == "absent"


@contract("4.3/timestamp")
@pytest.mark.parametrize(
    "text", ["2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123456789Z", "2026-01-02T03:04:05+02:00", "2026-01-02T03:04:05.5-11:30"]
)
def test_every_spelling_of_rfc_3339_is_read(fresh, text):
    assert init(fresh, {"timestamp": text}).status_code == 204


@contract("4.3/timestamp")
def test_an_init_does_not_set_the_clock_of_a_machine_that_is_not_the_agents(fresh):
    before = time.time()
    assert init(fresh, {"timestamp": "2020-01-01T00:00:00Z"}).status_code == 204
    assert abs(time.time() - before) < 5


@contract("4.3/lifecycle")
def test_a_lifecycle_id_is_accepted(fresh):
    for value in ("one", "one", "two"):
        assert init(fresh, {"lifecycleID": value, "volumeMounts": [], "hyperloopIP": ""}).status_code == 204


@contract("4.3/env", "4.3/token")
def test_many_inits_at_once_leave_one_whole_state(fresh):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: init(fresh, {"envVars": {"A": str(n), "B": str(n)}}).status_code, range(64)))
    assert answers == [204] * 64
    told = envs(fresh)
    assert told["A"] == told["B"]
