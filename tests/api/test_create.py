"""What create accepts and what it says when it does not."""

import re

import pytest
from e2b import Sandbox, SandboxException

VERSIONS = pytest.mark.parametrize("version", ["", "/v2"], ids=["v1", "v2"])


def refused(containers, version: str, status: int, **body) -> str:
    answer = containers.request("POST", f"{version}/sandboxes", json=body)
    assert answer.status_code == status, f"{answer.status_code}: {answer.text}"
    assert answer.json()["code"] == status
    return answer.json()["message"]


@VERSIONS
@pytest.mark.parametrize("value", ["59", "abc", "-1", "60.5", "", "999999", "3601", " 60", "6e1", "0"])
def test_a_wrong_idle_timeout_is_refused_with_the_rule(containers, version, value):
    message = refused(containers, version, 400, templateID="base", metadata={"idle_timeout": value})
    assert "idle_timeout" in message
    for bound in ("60", "3600"):
        assert re.search(rf"(?<![\d.]){bound}(?![\d.]\d)", message.replace(repr(value), "").replace(f'"{value}"', "")), message
    assert containers.sandboxes() == []


@pytest.mark.parametrize("value", ["60", "3600"])
def test_the_bounds_of_idle_timeout_are_accepted(containers, value):
    sandbox = Sandbox.create(metadata={"idle_timeout": value, "other": "key"}, **containers.sdk())
    told = containers.explain(sandbox.sandbox_id)
    assert (told["state"], told["idle_timeout_s"]) == ("running", int(value))


def test_a_wrong_idle_timeout_reaches_an_sdk_as_its_400(containers):
    with pytest.raises(SandboxException, match="400.*idle_timeout"):
        Sandbox.create(metadata={"idle_timeout": "59"}, **containers.sdk())


@VERSIONS
def test_the_answer_has_what_every_sdk_reads(containers, version):
    created = containers.create(version)
    assert re.fullmatch(r"[a-z0-9]+", created["sandboxID"])
    assert created["templateID"]
    assert created["alias"] == "base"
    assert re.fullmatch(r"[a-z0-9]+", created["clientID"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", created["envdVersion"])
    assert tuple(map(int, created["envdVersion"].split("."))) >= (0, 6, 4)
    assert len(created["envdAccessToken"]) >= 32
    assert created.get("domain") is None


def test_each_sandbox_has_its_own_id_and_token(containers):
    first, second = containers.create(), containers.create()
    assert first["sandboxID"] != second["sandboxID"]
    assert first["envdAccessToken"] != second["envdAccessToken"]


def test_a_sandbox_is_usable_when_the_answer_is_sent(containers):
    sandbox = Sandbox.create(envs={"GREETING": "hello"}, **containers.sdk())
    assert sandbox.commands.run("echo $GREETING").stdout == "hello\n"


@VERSIONS
def test_unknown_fields_and_every_sdks_own_are_accepted(containers, version):
    containers.create(
        version,
        timeout=300,
        autoPause=False,
        secure=False,
        allowInternetAccess=True,
        allow_internet_access=True,
        envVars={},
        metadata={},
        of_the_future={"a": [1]},
    )


@VERSIONS
@pytest.mark.parametrize(
    "field, body",
    [
        ("templateID", {}),
        ("templateID", {"templateID": 5}),
        ("timeout", {"templateID": "base", "timeout": "soon"}),
        ("timeout", {"templateID": "base", "timeout": 1.5}),
        ("timeout", {"templateID": "base", "timeout": 0}),
        ("timeout", {"templateID": "base", "timeout": -5}),
        ("timeout", {"templateID": "base", "timeout": 3601}),
        ("metadata", {"templateID": "base", "metadata": "x"}),
        ("metadata", {"templateID": "base", "metadata": {"idle_timeout": 60}}),
        ("envVars", {"templateID": "base", "envVars": {"A": 1}}),
    ],
)
def test_a_malformed_field_is_named(containers, version, field, body):
    assert field.lower() in refused(containers, version, 400, **body).lower()
    assert containers.sandboxes() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"base"', b"\xff\xfe"])
def test_a_body_that_is_no_object_is_400_json(containers, content):
    answer = containers.request(
        "POST", "/v2/sandboxes", content=content, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["code"] == 400
    assert answer.json()["message"]


def test_an_unknown_template_is_404_and_named(containers):
    assert "no-such-template" in refused(containers, "/v2", 404, templateID="no-such-template")


@pytest.mark.parametrize("template", ["../base", "base/../base", "/etc", ".", "", "base\0"])
def test_a_template_name_is_not_a_path(containers, template):
    answer = containers.request("POST", "/v2/sandboxes", json={"templateID": template})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["code"] == answer.status_code


def test_the_code_interpreters_default_template_is_served(containers):
    created = containers.create(templateID="code-interpreter-v1")
    assert containers.info(created["sandboxID"])["state"] == "running"
