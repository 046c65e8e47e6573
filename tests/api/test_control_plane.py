"""Get, list, connect, timeout and kill, in both spellings; every answer is JSON that the SDKs can tell apart."""

import re
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import httpx
import pytest
from e2b import AuthenticationException, Sandbox, SandboxNotFoundException, SandboxQuery

from harness import locations
from harness.processes import wait_until

UNKNOWN = "i" + "0" * 20


def ids(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [listed["sandboxID"] for listed in answer.json()]


# --- get ---


def test_info_has_the_fields_of_the_contract(containers):
    created = containers.create(metadata={"a": "b c", "ü": "ö"}, timeout=100)
    info = containers.info(created["sandboxID"])
    assert info["sandboxID"] == created["sandboxID"]
    assert info["templateID"] == created["templateID"]
    assert info["alias"] == "base"
    assert info["metadata"] == {"a": "b c", "ü": "ö"}
    assert info["state"] == "running"
    for name in ("cpuCount", "memoryMB", "diskSizeMB"):
        assert isinstance(info[name], int) and info[name] > 0, name
    assert info["envdVersion"] == created["envdVersion"]
    assert info["clientID"] == created["clientID"]
    started, ends = (datetime.fromisoformat(info[name]) for name in ("startedAt", "endAt"))
    assert (ends - started).total_seconds() == pytest.approx(100, abs=1)
    assert info["startedAt"].endswith("Z") and info["endAt"].endswith("Z")


def test_an_id_may_carry_the_client_id_of_old_sdks(containers):
    created = containers.create()
    long_id = f"{created['sandboxID']}-6532622b"
    assert containers.info(long_id)["sandboxID"] == created["sandboxID"]
    assert containers.request("POST", f"/sandboxes/{long_id}/timeout", json={"timeout": 50}).status_code == 204
    assert containers.request("DELETE", f"/sandboxes/{long_id}").status_code == 204


def test_an_id_with_two_dashes_is_400(containers):
    answer = containers.request("GET", f"/sandboxes/{UNKNOWN}-a-b")
    assert answer.status_code == 400
    assert answer.json()["code"] == 400


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("GET", "/sandboxes/{}", None),
        ("DELETE", "/sandboxes/{}", None),
        ("POST", "/sandboxes/{}/timeout", {"timeout": 60}),
        ("POST", "/sandboxes/{}/connect", {"timeout": 60}),
        ("POST", "/v2/sandboxes/{}/connect", {}),
        ("GET", "/sandboxes/{}/idle", None),
    ],
)
def test_an_unknown_sandbox_is_404_json_everywhere(containers, method, path, body):
    answer = containers.request(method, path.format(UNKNOWN), json=body)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["code"] == 404
    assert UNKNOWN in answer.json()["message"]


# --- kill ---


def test_kill_is_204_once_and_404_after(containers):
    sandbox_id = containers.create()["sandboxID"]
    first = containers.request("DELETE", f"/sandboxes/{sandbox_id}")
    assert (first.status_code, first.content) == (204, b"")
    second = containers.request("DELETE", f"/sandboxes/{sandbox_id}")
    assert (second.status_code, second.json()["code"]) == (404, 404)
    assert containers.request("GET", f"/sandboxes/{sandbox_id}").status_code == 404


def test_killing_twice_at_once_answers_both(containers):
    sandbox_id = containers.create()["sandboxID"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: containers.request("DELETE", f"/sandboxes/{sandbox_id}"), range(8)))
    assert sorted({answer.status_code for answer in answers}) == [204, 404]


def test_a_dead_sandbox_raises_what_the_sdk_documents(containers):
    sandbox = Sandbox.create(**containers.sdk())
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    with pytest.raises(SandboxNotFoundException):
        sandbox.set_timeout(60)
    with pytest.raises(SandboxNotFoundException):
        sandbox.get_info()
    with pytest.raises(SandboxNotFoundException):
        Sandbox.connect(sandbox.sandbox_id, **containers.sdk())


# --- connect ---


@pytest.mark.parametrize("path, body", [("/sandboxes/{}/connect", {"timeout": 300}), ("/v2/sandboxes/{}/connect", {})])
def test_connect_answers_200_with_the_same_sandbox(containers, path, body):
    created = containers.create()
    answer = containers.request("POST", path.format(created["sandboxID"]), json=body)
    assert answer.status_code == 200, answer.text
    for name in ("sandboxID", "templateID", "clientID", "envdVersion", "envdAccessToken"):
        assert answer.json()[name] == created[name]


def test_connect_without_a_body_is_accepted_in_v2(containers):
    created = containers.create()
    assert containers.request("POST", f"/v2/sandboxes/{created['sandboxID']}/connect").status_code == 200


@pytest.mark.parametrize("body", [{}, {"timeout": "soon"}, {"timeout": None}])
def test_set_timeout_names_its_field(containers, body):
    created = containers.create()
    answer = containers.request("POST", f"/sandboxes/{created['sandboxID']}/timeout", json=body)
    assert answer.status_code == 400
    assert "timeout" in answer.json()["message"]


# --- list ---


@pytest.mark.parametrize("path", ["/sandboxes", "/v2/sandboxes"])
def test_list_has_the_fields_of_the_contract(containers, path):
    created = containers.create(metadata={"a": "b"})
    [listed] = containers.request("GET", path).json()
    assert listed["sandboxID"] == created["sandboxID"]
    assert listed["metadata"] == {"a": "b"}
    for name in ("templateID", "clientID", "startedAt", "endAt", "cpuCount", "memoryMB", "diskSizeMB", "envdVersion"):
        assert name in listed, name
    assert listed["state"] == "running"
    assert "envdAccessToken" not in listed, "a list is not a bunch of keys"


def test_the_metadata_filter_is_decoded_as_often_as_the_sdks_encode_it(containers):
    """{"a":"b c"} arrives as metadata=a%3Db%252520c."""
    wanted = containers.create(metadata={"a": "b c", "more": "x"})["sandboxID"]
    containers.create(metadata={"a": "b"})
    assert ids(containers.request("GET", "/v2/sandboxes?metadata=a%3Db%252520c")) == [wanted]
    assert ids(containers.request("GET", "/sandboxes?metadata=a%3Db%252520c")) == [wanted]
    assert ids(containers.request("GET", "/v2/sandboxes?metadata=a%3Db%252520c%26more%3Dx")) == [wanted]
    assert ids(containers.request("GET", "/v2/sandboxes?metadata=a%3Db%252520c%26more%3Dy")) == []


@pytest.mark.parametrize("value", ["b c", "a&b=c", "100 %", "ü/ö", "+", ""])
def test_any_metadata_value_can_be_looked_for(containers, value):
    key = f"key-{uuid.uuid4().hex[:8]} &="
    wanted = Sandbox.create(metadata={key: value}, **containers.sdk())
    Sandbox.create(metadata={key: value + "x"}, **containers.sdk())
    found = Sandbox.list(query=SandboxQuery(metadata={key: value}), **containers.sdk()).next_items()
    assert [info.sandbox_id for info in found] == [wanted.sandbox_id]
    assert found[0].metadata == {key: value}


def test_paging_visits_each_once_newest_first(containers):
    created = []
    for _ in range(5):
        created.append(containers.create()["sandboxID"])
        time.sleep(0.01)
    pages = Sandbox.list(limit=2, **containers.sdk())
    seen = []
    while pages.has_next:
        page = pages.next_items()
        assert len(page) <= 2
        seen += [info.sandbox_id for info in page]
    assert seen == created[::-1]


def test_the_last_page_has_no_next_token(containers):
    containers.create()
    containers.create()
    first = containers.request("GET", "/v2/sandboxes", params={"limit": 1})
    token = first.headers["x-next-token"]
    assert first.headers["x-total-running"] == "2"
    last = containers.request("GET", "/v2/sandboxes", params={"limit": 1, "nextToken": token})
    assert "x-next-token" not in last.headers
    assert ids(first) != ids(last)


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"nextToken": "nonsense"}])
def test_a_wrong_page_is_400(containers, query):
    answer = containers.request("GET", "/v2/sandboxes", params=query)
    assert answer.status_code == 400
    assert answer.json()["code"] == 400


def test_list_by_state(containers):
    created = containers.create()["sandboxID"]
    assert ids(containers.request("GET", "/v2/sandboxes", params={"state": "running"})) == [created]
    assert ids(containers.request("GET", "/v2/sandboxes", params={"state": "running,paused"})) == [created]
    assert ids(containers.request("GET", "/v2/sandboxes", params={"state": "paused"})) == []


# --- who may ask, and what nobody can ask ---


def test_with_keys_configured_another_or_none_is_401_json_everywhere(hostd):
    guarded = hostd(api_key="secret")
    paths = ("/sandboxes", "/v2/sandboxes", f"/sandboxes/{UNKNOWN}", f"/sandboxes/{UNKNOWN}/idle", "/tombstones")
    for path in paths:
        for headers in ({}, {"X-API-KEY": ""}, {"X-API-KEY": "wrong"}):
            answer = httpx.get(guarded.api_url + path, headers=headers, trust_env=False)
            assert (answer.status_code, answer.json()["code"]) == (401, 401), f"{path} with {headers}"
        answer = httpx.get(guarded.api_url + path, headers={"X-API-KEY": "secret"}, trust_env=False)
        assert answer.status_code in (200, 404)
    assert httpx.get(guarded.api_url + "/health", trust_env=False).status_code == 200
    with pytest.raises(AuthenticationException):
        Sandbox.create(**{**guarded.sdk(), "api_key": "wrong"})
    assert Sandbox.create(**guarded.sdk()).kill() is True


def test_health_needs_no_key(containers):
    assert httpx.get(containers.api_url + "/health", trust_env=False).status_code == 200


@pytest.mark.parametrize("method, path", [("GET", "/nothing/here"), ("POST", "/v3/sandboxes"), ("GET", "/"), ("GET", "/v2")])
def test_an_unknown_route_is_404_json(containers, method, path):
    answer = containers.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["code"] == 404


@pytest.mark.parametrize("method, path", [("PUT", "/sandboxes"), ("DELETE", "/v2/sandboxes"), ("GET", f"/sandboxes/{UNKNOWN}/timeout")])
def test_an_unknown_method_is_405_json(containers, method, path):
    answer = containers.request(method, path)
    assert answer.status_code == 405
    assert answer.json()["code"] == 405


@pytest.mark.parametrize("operation", ["pause", "snapshots", "fork"])
def test_what_this_host_cannot_do_is_not_mistaken_for_a_missing_sandbox(containers, operation):
    created = containers.create()
    answer = containers.request("POST", f"/sandboxes/{created['sandboxID']}/{operation}", json={})
    assert answer.status_code in (400, 501), answer.text
    assert answer.json()["code"] == answer.status_code


# --- the admin view ---


def test_explain_says_why_it_lives_and_asking_changes_nothing(containers):
    created = containers.create(metadata={"idle_timeout": "60"})
    first = containers.explain(created["sandboxID"])
    time.sleep(1)
    second = containers.explain(created["sandboxID"])
    assert second["sandbox_id"] == created["sandboxID"]
    assert (second["state"], second["ended"], second["holds"]) == ("running", None, [])
    assert second["idle_for_s"] - first["idle_for_s"] == pytest.approx(1, abs=0.5)
    assert second["releases_in_s"] == pytest.approx(60 - second["idle_for_s"], abs=0.5)
    assert second["ends_in_s"] == pytest.approx(3600, abs=10)


def test_explain_remembers_what_changed_but_not_for_ever(containers, sandbox):
    for _ in range(40):
        sandbox.commands.run("true")
    transitions = containers.explain(sandbox.sandbox_id)["transitions"]
    assert 1 <= len(transitions) <= 32
    assert {"at", "what"} <= transitions[0].keys()


def test_explain_names_the_command_that_holds(containers, sandbox):
    command = sandbox.commands.run("sleep 100", background=True, timeout=0)

    def holding() -> list[dict]:
        return [hold for hold in containers.explain(sandbox.sandbox_id)["holds"] if hold["counts"]]

    # The agent tells changes at most twice a second.
    [hold] = wait_until(holding, within=1, what="a hold is shown")
    assert (hold["class"], hold["side"]) == ("command", "guest")
    assert "sleep 100" in hold["origin"]
    assert hold["pid"] > 0
    assert containers.explain(sandbox.sandbox_id)["idle_for_s"] == 0
    command.kill()
    wait_until(lambda: not holding(), within=1, what="the hold is gone")


def test_a_tombstone_says_when_and_why(containers):
    created = containers.create(timeout=60)
    containers.request("DELETE", f"/sandboxes/{created['sandboxID']}")
    told = containers.explain(created["sandboxID"])
    assert told["state"] == "ended"
    ended = told["ended"]
    assert ended["reason"] == "killed"
    assert ended["lived_s"] >= 0
    assert abs(datetime.fromisoformat(ended["at"]).timestamp() - time.time()) < 10
    everything = containers.request("GET", "/tombstones")
    assert everything.status_code == 200
    assert created["sandboxID"] in everything.text


def test_hostd_explain_prints_the_same_for_people(containers):
    created = containers.create(metadata={"idle_timeout": "60"})
    done = subprocess.run(
        [locations.hostd(), "explain", created["sandboxID"], "--api", containers.api_url],
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 0, done.stderr
    assert created["sandboxID"] in done.stdout
    assert re.search(r"idle|running", done.stdout)


def test_metrics_are_prometheus_text(containers):
    containers.create()
    answer = containers.request("GET", "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(("text/plain", "application/openmetrics-text"))
    samples = [line for line in answer.text.splitlines() if line and not line.startswith("#")]
    assert samples
    for line in samples:
        assert re.fullmatch(r'[a-zA-Z_:][\w:]*(\{.*\})? [-+0-9.eEInfNa]+', line), line
