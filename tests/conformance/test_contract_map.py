"""The map from the contract to the cases is whole: no row is forgotten, and no case claims a row that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract_map import ROWS, WITHOUT

HERE = Path(__file__).parent


@pytest.fixture
def found(once):
    """What a collection of this folder alone says, whatever was selected for this run."""

    def collect() -> str:
        command = [sys.executable, "-m", "pytest", str(HERE), "-n", "0", "-q", "--contract-map", "json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=HERE.parent)
        line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
        assert line, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return line

    return json.loads(once("contract-map", collect))


def test_every_row_has_a_case_or_a_reason(found):
    assert [row for row in ROWS if row not in found["rows"] and row not in WITHOUT] == []


def test_no_row_has_both_a_case_and_an_excuse(found):
    assert [row for row in WITHOUT if row in found["rows"]] == []


def test_no_case_claims_a_row_that_does_not_exist(found):
    assert [row for row in found["rows"] if row not in ROWS] == []
    assert [row for row in WITHOUT if row not in ROWS] == []


def test_there_are_enough_cases_and_a_third_of_them_run_in_a_machine(found):
    assert found["cases"] >= 250
    assert found["through_hostd"] * 3 >= found["cases"]
