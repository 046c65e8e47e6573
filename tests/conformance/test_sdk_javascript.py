"""What the JavaScript SDKs show their users. One node process looks at everything, `sdk.mjs`; each case here is one of its lines."""

import json
from pathlib import Path

import pytest

from harness.planes import HOME
from harness.programs import run_node

contract = pytest.mark.contract
PROGRAM = (Path(__file__).parent / "sdk.mjs").read_text()


@pytest.fixture
def seen(plane, once):
    """`seen(sdk)`: what the node process saw, by case and with the box's path left out."""

    def look(sdk: str) -> dict:
        def run() -> str:
            box = plane.folder()
            return run_node(PROGRAM, {**plane.environment, **_vendor(plane), "SDK": sdk, "BOX": box}, within=180).replace(
                box, "BOX"
            )

        return {line["case"]: line for line in map(json.loads, once(f"javascript-{sdk}-{plane.name}", run).splitlines())}

    return look


def _vendor(plane) -> dict:
    """The same environment for the SDKs with another prefix."""
    return {f"NOVITA_{name.removeprefix('E2B_')}": value for name, value in plane.environment.items() if name.startswith("E2B_")}


CASES = [
    (
        "command",
        {"stdout": f"out\n{HOME}\nuser\n", "stderr": "err\n", "exitCode": 0, "error": None},
        ["2.7/exit-0", "1.4/js", "8.3/debug"],
    ),
    ("exit-code", {"name": "CommandExitError", "exitCode": 7, "stdout": "out\n", "message": "exit status 7"}, ["2.7/exit-n"]),
    ("signalled", {"name": "CommandExitError", "exitCode": -1, "stdout": "", "message": "signal: terminated"}, ["2.7/signal"]),
    ("environment", "one|two words\n", ["2.3/request"]),
    ("folder", "BOX\n", ["2.4/absolute"]),
    ("bad-folder", "InvalidArgumentError", ["1.8/invalid_argument", "1.10/cwd-missing"]),
    (
        "unknown-user",
        {"name": "AuthenticationError", "message": "[unauthenticated] invalid username: 'ghost'"},
        ["1.8/unauthenticated", "1.10/basic-unknown"],
    ),
    (
        "unknown-users-list",
        {"name": "AuthenticationError", "message": "[unauthenticated] invalid username: 'ghost'"},
        ["1.8/unauthenticated", "1.10/basic-unknown"],
    ),
    ("other-user", "root\n", ["2.1/basic"]),
    ("timeout", "TimeoutError", ["1.8/deadline_exceeded", "2.10/start"]),
    ("streamed-output", {"texts": ["a\n", "b\n"], "apart": True}, ["1.6/flush"]),
    ("many-at-once", [f"{n}\n" for n in range(20)], ["0/port"]),
    ("stdin", "grüße x\nend\n", ["1.1/SendInput", "1.1/CloseStdin"]),
    (
        "list-join-kill",
        {
            "cmd": "/bin/bash",
            "args": ["-l", "-c", "sleep 60"],
            "envs": {"A": "b"},
            "killed": [True, False],
            "ends": [[-1, "signal: killed"], [-1, "signal: killed"]],
        },
        ["1.1/List", "1.1/Connect", "1.1/SendSignal", "1.8/kill-false"],
    ),
    ("join-nobody", "NotFoundError", ["1.8/connect", "1.8/not_found"]),
    ("kill-nobody", False, ["1.8/kill-false"]),
    ("broken-text", True, ["2.6/bytes"]),
    ("megabytes", 5_000_000, ["2.6/end-after-output"]),
    ("terminal", True, ["2.5/pty", "2.5/resize", "1.1/Update"]),
    ("terminal-kill", [True, False], ["2.11/kill"]),
    (
        "write-read",
        {"path": "BOX/new/file.txt", "name": "file.txt", "type": "file", "text": "grüße\n", "bytes": 8, "streamed": 8},
        ["4.6/multipart", "4.6/reply", "4.5/gzip"],
    ),
    ("write-blob-and-buffer", ["blob", "buffer"], ["4.6/multipart"]),
    ("write-octets-and-gzip", [100_000, 100_000], ["4.6/octets", "4.6/gzip", "8.1/gates"]),
    ("write-several", {"paths": ["BOX/s/one", "BOX/s/two"], "texts": ["1", "2"]}, ["4.6/multipart"]),
    ("metadata", {"kind": "report"}, ["4.6/metadata", "3.3/metadata"]),
    ("missing", {"names": ["FileNotFoundError"] * 4, "exists": False}, ["1.8/file-not-found", "1.8/exists-false"]),
    ("wrong-kind", ["InvalidArgumentError"] * 3, ["1.8/invalid_argument", "1.8/http-bodies"]),
    ("make-dir", [True, False], ["1.8/already_exists"]),
    (
        "info",
        {
            "name": "info",
            "type": "file",
            "path": "BOX/info",
            "size": 5,
            "mode": 0o644,
            "permissions": "-rw-r--r--",
            "owner": "user",
            "group": "user",
        },
        ["1.3/EntryInfo", "3.3/mode", "3.3/permissions", "3.3/owner"],
    ),
    ("link", {"type": "file", "target": "BOX/l/target"}, ["3.3/symlink-target", "3.3/type"]),
    (
        "list",
        ["BOX/t/subdir1", "BOX/t/subdir1/subdir1_1", "BOX/t/subdir1/subdir1_2", "BOX/t/subdir2"],
        ["3.2/list-order", "3.2/list-depth"],
    ),
    ("rename-remove", ["BOX/r/deep/b", 0], ["3.2/move", "3.2/remove"]),
    ("watch", ["create", "nested"], ["1.1/WatchDir", "3.4/nested", "3.4/recursive"]),
    ("watch-entry", {"name": "file", "path": "BOX/e/file", "type": "file"}, ["3.4/entry"]),
    ("watch-missing", "FileNotFoundError", ["1.8/file-not-found", "1.10/watch-missing"]),
    ("running", True, ["4/health"]),
]
# The Novita SDK is older: no metadata, no octet streams, no closing of stdin, errors without the file's own class.
NOT_NOVITA = {"stdin", "metadata", "write-octets-and-gzip", "watch-entry"}
# Guests below Linux 6.6 keep no attributes on tmpfs, which is what the writable layer is made of.
NOT_IN_A_MACHINE = {"metadata"}


def case(name, expected, rows):
    return pytest.param(name, expected, marks=contract(*rows), id=name)


@pytest.mark.through_hostd
@pytest.mark.parametrize("name, expected", [case(*each) for each in CASES if each[0] not in NOT_IN_A_MACHINE])
def test_the_e2b_sdk_shows(plane, seen, name, expected):
    line = seen("e2b")[name]
    assert line.get("value", line) == expected


@contract("4.6/metadata", "3.3/metadata")
def test_the_e2b_sdk_shows_metadata(plane, seen):
    assert seen("e2b")["metadata"]["value"] == {"kind": "report"}


@pytest.mark.parametrize(
    "name, expected", [case(name, expected, [*rows, "10/old-proto"]) for name, expected, rows in CASES if name not in NOT_NOVITA]
)
def test_the_novita_sdk_shows(plane, seen, name, expected):
    line = seen("novita-sandbox")[name]
    value = line.get("value", line)
    if name in ("missing", "watch-missing"):
        # Its one class for what is not there.
        value = json.loads(json.dumps(value).replace('"NotFoundError"', '"FileNotFoundError"'))
    assert value == expected
