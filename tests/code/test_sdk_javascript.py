"""What the code interpreter's JavaScript SDK shows its users. One node process looks at everything, `code.mjs`; each case is one of its lines."""

import json
from pathlib import Path

import pytest

from harness.programs import run_node

PROGRAM = (Path(__file__).parent / "code.mjs").read_text()


@pytest.fixture(scope="session")
def seen(_interpreter, once):
    """What the node process saw, by case."""

    def run() -> str:
        return run_node(PROGRAM, _interpreter.environment, within=180)

    return {line["case"]: line for line in map(json.loads, once("javascript-code", run).splitlines())}


CASES = {
    "result": {"text": "1", "error": None, "main": True},
    "callbacks": {
        "order": ["one\n", "two\n", "three", "four"],
        "apart": True,
        "logs": {"stdout": ["one\n"], "stderr": ["two\n"]},
    },
    "error": {"name": "NameError", "value": "name 'missing' is not defined", "traceback": True, "results": 0},
    "counts": [1, 2],
    "state-and-restart": ["42", "NameError"],
    "contexts": {"language": "bash", "cwd": "/tmp", "newest": True, "where": ["/tmp\n"], "gone": "NotFoundError", "said": True},
    "unknown-context": ["NotFoundError", "NotFoundError"],
    "unknown-language": True,
    "languages": {name: ["hi\n"] for name in ("python", "js", "javascript", "ts", "typescript", "bash")},
    "variables": [["it's $5\n"], ["None\n"]],
    "timeout": {"name": "TimeoutError", "kept": "kept", "soon": True},
    "strange-line-ends": True,
    "megabytes": 3_000_001,
    "table": True,
    "figure": "iVBOR",
    "extra": {"text": "t", "extra": {"application/x-ours": {"a": 1}}},
    "kernel-dies": ["KernelDied", "2"],
    "at-once": [f"answer {n}" for n in range(12)],
    "side-by-side": {"texts": ["0", "1", "2"], "soon": True},
}


@pytest.mark.takes(10)
@pytest.mark.parametrize("name", CASES)
def test_the_javascript_sdk_shows(seen, name):
    line = seen[name]
    assert line.get("value", line) == CASES[name]
