"""Which deadline holds after create, setTimeout and connect; the rules are hostd's own, so containers do."""

import time
from datetime import datetime, timezone

import pytest
from e2b import Sandbox, SandboxException

NEAR = 1.5


def seconds_left(hostd, sandbox_id: str) -> float:
    ends = datetime.fromisoformat(hostd.info(sandbox_id)["endAt"])
    return (ends - datetime.now(timezone.utc)).total_seconds()


def seconds_in_all(hostd, sandbox_id: str) -> float:
    info = hostd.info(sandbox_id)
    return (datetime.fromisoformat(info["endAt"]) - datetime.fromisoformat(info["startedAt"])).total_seconds()


def test_without_a_timeout_the_end_is_300_seconds_after_the_start(containers):
    sandbox = Sandbox.create(**containers.sdk())
    assert seconds_in_all(containers, sandbox.sandbox_id) == pytest.approx(300, abs=NEAR)


def test_with_an_idle_timeout_the_always_sent_timeout_is_not_the_limit(containers):
    """Novita and PPIO send 300 even when the user gave none."""
    created = containers.create("", timeout=300, metadata={"idle_timeout": "60"})
    assert seconds_in_all(containers, created["sandboxID"]) == pytest.approx(3600, abs=NEAR)


@pytest.mark.parametrize("seconds", [30, 900])
def test_set_timeout_counts_from_now_and_may_shorten_or_extend(containers, seconds):
    sandbox = Sandbox.create(timeout=120, **containers.sdk())
    sandbox.set_timeout(seconds)
    assert seconds_left(containers, sandbox.sandbox_id) == pytest.approx(seconds, abs=NEAR)


def test_set_timeout_wins_over_an_idle_timeout(containers):
    sandbox = Sandbox.create(metadata={"idle_timeout": "600"}, **containers.sdk())
    sandbox.set_timeout(30)
    assert seconds_left(containers, sandbox.sandbox_id) == pytest.approx(30, abs=NEAR)


def test_set_timeout_is_clamped_to_the_maximum_lifetime_and_not_refused(containers):
    sandbox = Sandbox.create(timeout=60, **containers.sdk())
    time.sleep(2)
    sandbox.set_timeout(100_000)
    assert seconds_in_all(containers, sandbox.sandbox_id) == pytest.approx(3600, abs=NEAR)


def test_set_timeout_of_zero_ends_it_now(containers):
    sandbox = Sandbox.create(timeout=60, **containers.sdk())
    asked = time.monotonic()
    sandbox.set_timeout(0)
    at, ended = containers.wait_until_ended(sandbox.sandbox_id, within=5)
    assert at - asked <= 1.5
    assert ended["reason"] == "timeout"


def test_connect_never_shortens(containers):
    sandbox = Sandbox.create(timeout=600, **containers.sdk())
    Sandbox.connect(sandbox.sandbox_id, timeout=10, **containers.sdk())
    assert seconds_left(containers, sandbox.sandbox_id) == pytest.approx(600, abs=2 * NEAR)


def test_connect_extends(containers):
    sandbox = Sandbox.create(timeout=60, **containers.sdk())
    Sandbox.connect(sandbox.sandbox_id, timeout=600, **containers.sdk())
    assert seconds_left(containers, sandbox.sandbox_id) == pytest.approx(600, abs=NEAR)


def test_connect_is_one_touch_of_the_idle_clock(hostd):
    containers = hostd(idle_floor=1)
    created = containers.create(metadata={"idle_timeout": "4"})
    time.sleep(3)
    answer = containers.request("POST", f"/v2/sandboxes/{created['sandboxID']}/connect", json={})
    touched = time.monotonic()
    assert answer.status_code == 200
    at, ended = containers.wait_until_ended(created["sandboxID"], within=10)
    assert ended["reason"] == "idle"
    assert 4 - 0.1 <= at - touched <= 5


@pytest.mark.parametrize("timeout", [3601, 86_400])
def test_a_timeout_above_the_maximum_is_refused_at_create_and_connect(containers, timeout):
    with pytest.raises(SandboxException, match="(?i)timeout") as refusal:
        Sandbox.create(timeout=timeout, **containers.sdk())
    assert refusal.value.status_code == 400

    sandbox = Sandbox.create(**containers.sdk())
    before = containers.info(sandbox.sandbox_id)["endAt"]
    with pytest.raises(SandboxException, match="(?i)timeout") as refusal:
        Sandbox.connect(sandbox.sandbox_id, timeout=timeout, **containers.sdk())
    assert refusal.value.status_code == 400
    assert containers.info(sandbox.sandbox_id)["endAt"] == before


def test_a_lower_maximum_lifetime_bounds_idle_timeouts_too(hostd):
    containers = hostd(max_lifetime=100)
    answer = containers.request(
        "POST", "/v2/sandboxes", json={"templateID": "base", "metadata": {"idle_timeout": "101"}}
    )
    assert answer.status_code == 400
    assert "100" in answer.json()["message"]
    assert seconds_in_all(containers, containers.create(metadata={"idle_timeout": "100"})["sandboxID"]) == pytest.approx(
        100, abs=NEAR
    )
