"""The clouds' own samples, run as written against microVMs: whoever has such code changes the environment and nothing else."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from harness.programs import run_node, run_python

SAMPLES = Path(__file__).parent
# create under emulation + the sample's own 90 s + kill
WITHIN = 200


def run(sample: str, environment: dict) -> str:
    program = run_python if sample.endswith(".py") else run_node
    return program((SAMPLES / sample).read_text(), environment, WITHIN)


@pytest.mark.vms(1)
@pytest.mark.takes(100)
@pytest.mark.parametrize(
    "sample", ["000_idle_timeout.py", "000_idle_timeout.mjs", "001_idle_timeout.py", "001_idle_timeout.mjs"]
)
def test_idle_sample_sees_its_sandbox_released_and_may_still_kill_it(machines, sample):
    printed = run(sample, machines.environment())

    assert re.search(r"Sandbox is running (False|false)", printed), printed
    assert re.search(r"exit_?[cC]ode[:=] ?0", printed), f"the command's result is not printed: {printed}"
    sandbox_id = re.search(r"Sandbox created ([a-z0-9]+)", printed)[1]
    assert machines.tombstone(sandbox_id)["reason"] == "idle"


@pytest.mark.vms(1)
@pytest.mark.takes(15)
@pytest.mark.parametrize("sample", ["002_create_with_timeout.mjs", "002_set_timeout.mjs", "002_kill.mjs"])
def test_lifecycle_sample_runs_to_its_end_and_leaves_no_sandbox(machines, sample):
    run(sample, machines.environment())

    assert machines.sandboxes() == []


@pytest.mark.vms(1)
@pytest.mark.takes(15)
def test_set_timeout_sample_moves_the_end_to_30_seconds_from_now(machines):
    """The sample itself prints nothing: the same lines with one more that asks."""
    sample = (SAMPLES / "002_set_timeout.mjs").read_text()
    call = "await sandbox.setTimeout(30_000)\n"
    assert call in sample
    asking = "console.log(JSON.stringify({ now: Date.now(), endAt: (await sandbox.getInfo()).endAt.getTime() }))\n"
    told = json.loads(run_node(sample.replace(call, call + asking), machines.environment(), WITHIN))

    assert told["endAt"] - told["now"] == pytest.approx(30_000, abs=1_500)


@pytest.mark.vms(1)
@pytest.mark.takes(15)
def test_get_info_sample_prints_the_fields_that_it_shows(machines):
    printed = run("002_get_info.mjs", machines.environment())

    for name in ("sandboxId: '", "templateId: '", "name: '", "metadata: {}"):
        assert name in printed, f"{name} is not in {printed}"
    started, ends = (
        datetime.fromisoformat(re.search(rf"{name}: (\S+?),?\n", printed)[1]) for name in ("startedAt", "endAt")
    )
    assert (ends - started).total_seconds() == pytest.approx(60, abs=1.5)
