"""Freezing: clients' commands stand still for a snapshot, the machine goes on answering, and nothing stays frozen by accident."""

import json
import os
import time
from pathlib import Path

import httpx
import pytest

from harness.connect import JSON_STREAM, Stream, call, envelope, frames, open_stream, process
from harness.guestd import Guestd

HOST = {"X-Guestd-Control": "host"}


@pytest.fixture
def hierarchy():
    """A cgroup v2 folder of the test's own, with the groups of clients' commands in it."""
    for mounted in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if os.access(f"{mounted}/cgroup.controllers", os.R_OK):
            root = Path(mounted) / f"guestd-test-{os.getpid()}-{time.monotonic_ns()}"
            break
    else:
        pytest.skip("freezing real groups was not tested: there is no cgroup v2 hierarchy here")
    try:
        root.mkdir()
    except OSError as error:
        pytest.skip(f"freezing real groups was not tested: {error}")
    for name in ("user", "ptys", "init.scope"):
        (root / name).mkdir()
    yield root
    for group in [*root.rglob("cgroup.procs")]:
        (group.parent / "cgroup.freeze").write_text("0")
        (group.parent / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 5
    for folder in [*sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True), root]:
        while True:
            try:
                folder.rmdir()
                break
            except OSError:
                assert time.monotonic() < deadline, f"{folder} cannot be removed"
                time.sleep(0.01)


@pytest.fixture
def frozen_agent(hierarchy):
    """An agent with that hierarchy, set up by a host."""
    agent = Guestd("--cgroup-root", str(hierarchy)).start()
    try:
        with agent.client() as client:
            assert client.post("/init", headers=HOST).status_code == 204
            yield client, hierarchy
    finally:
        agent.close()


def is_frozen(group: Path) -> bool:
    return "frozen 1" in (group / "cgroup.events").read_text()


def test_a_command_stands_still_until_the_next_init(frozen_agent):
    client, root = frozen_agent
    ticker = {"process": process("/bin/bash", "-c", "while :; do echo tick; sleep 0.02; done"), "tag": "ticker"}
    with open_stream(client, "process.Process/Start", ticker) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        (root / "user" / "cgroup.procs").write_text(str(pid))
        stream.until("data")
        answer = client.post("/freeze", params={"maxWaitMs": 5000}, headers=HOST)
        assert answer.status_code == 200, answer.text
        result = answer.json()
        assert result["mode"] == "legacy"
        assert (result["requested"], result["frozen"], result["notFrozen"]) == (2, 2, 0), result
        assert is_frozen(root / "user")
        assert client.get("/health").status_code == 204, "the agent itself is never frozen"
        thawed = client.post("/init", json={"thaw": "skip"}, headers=HOST)
        assert thawed.headers["x-envd-thaw"] == "skip" and is_frozen(root / "user")
        thawed = client.post("/init", json={}, headers=HOST)
        assert thawed.status_code == 204
        audit = json.loads(thawed.headers["x-envd-freeze-audit"])
        assert audit == {"visited": 2, "frozen": 2, "escaped": 0, "violations": 0, "truncated": False}
        assert not is_frozen(root / "user")
        stream.until("data")
        call(client, "process.Process/SendSignal", {"process": {"tag": "ticker"}, "signal": "SIGNAL_SIGKILL"})


def lines_until(client, last: str) -> list[tuple[str, dict]]:
    """The agent's log, up to a message."""
    told = []
    with client.stream(
        "POST", "/logs.v1.Logs/Follow", content=envelope({}), headers={**HOST, "Content-Type": JSON_STREAM}
    ) as response:
        for _flags, payload in frames(response.iter_raw()):
            told += [(line["message"], line.get("fields", {})) for line in json.loads(payload).get("lines", [])]
            if any(message == last for message, _ in told):
                return told
    raise AssertionError(f"the log ended without {last!r}: {told}")


def test_a_freeze_and_a_thaw_are_in_the_agents_log(tmp_path):
    agent = Guestd("--cgroup-root", str(tmp_path)).start()
    try:
        with agent.client() as client:
            assert client.post("/init", headers=HOST).status_code == 204
            assert client.post("/freeze", headers=HOST).status_code == 204
            assert client.post("/unfreeze", headers=HOST).status_code == 204
            told = [line for line in lines_until(client, "workload thawed") if line[0].startswith("workload")]
    finally:
        agent.close()
    assert [message for message, _ in told] == ["workload frozen", "workload thawed"]
    assert told[0][1]["requested"] == "0"


def test_hierarchy_freezes_all_but_what_the_machine_needs_and_respects_the_guests_own_freeze(frozen_agent):
    client, root = frozen_agent
    own = root / "the-guests"
    own.mkdir()
    (own / "cgroup.freeze").write_text("1")
    result = client.post("/freeze", params={"mode": "hierarchy", "maxWaitMs": 5000}, headers=HOST).json()
    assert (result["visited"], result["allowlisted"], result["preFrozen"], result["requested"]) == (4, 1, 1, 2), result
    assert result["truncated"] is False and result["failed"] == 0
    assert not is_frozen(root / "init.scope")
    assert client.post("/unfreeze", headers=HOST).status_code == 204
    assert is_frozen(own) and not is_frozen(root / "user")


def test_a_walk_is_bounded_and_says_so(frozen_agent):
    client, _ = frozen_agent
    parameters = {"mode": "hierarchy", "maxCgroups": 1, "maxWaitMs": 1000}
    result = client.post("/freeze", params=parameters, headers=HOST).json()
    assert result["visited"] == 1 and result["truncated"] is True
    client.post("/unfreeze", headers=HOST)


def test_who_does_not_wait_gets_no_result(frozen_agent):
    client, _ = frozen_agent
    for parameters in ({}, {"maxWaitMs": 0}):
        answer = client.post("/freeze", params=parameters, headers=HOST)
        assert (answer.status_code, answer.content) == (204, b"")
    assert client.post("/unfreeze", headers=HOST).status_code == 204


@pytest.mark.parametrize("parameters", [{"mode": "deep"}, {"maxCgroups": "many"}, {"maxWaitMs": "-1"}])
def test_parameters_that_make_no_sense_are_named(frozen_agent, parameters):
    client, root = frozen_agent
    answer = client.post("/freeze", params=parameters, headers=HOST)
    assert answer.status_code == 400 and answer.text
    assert not is_frozen(root / "user")


def test_without_control_groups_freezing_is_answered_and_does_nothing(tmp_path):
    agent = Guestd("--cgroup-root", str(tmp_path)).start()
    try:
        with agent.client() as client:
            client.post("/init", headers=HOST)
            result = client.post("/freeze", params={"maxWaitMs": 100}, headers=HOST)
            assert result.status_code == 200 and result.json()["requested"] == 0
            assert client.post("/freeze", headers=HOST).status_code == 204
            assert client.post("/unfreeze", headers=HOST).status_code == 204
    finally:
        agent.close()


def test_collapse_counts_chunks(frozen_agent):
    client, _ = frozen_agent
    counts = client.post("/collapse", headers=HOST).json()
    assert set(counts) == {"regions", "chunks", "collapsed", "alreadyHuge", "skipped", "elapsedMs"}
    assert counts["chunks"] == counts["collapsed"] + counts["alreadyHuge"] + counts["skipped"]


@pytest.mark.parametrize("path", ["/freeze", "/unfreeze", "/fsfreeze", "/fsthaw", "/collapse"])
def test_no_one_but_the_host_freezes(frozen_agent, path):
    client, root = frozen_agent
    for headers in ({}, {"X-Guestd-Control": "guess"}, {"X-Access-Token": "host"}):
        assert client.post(path, headers=headers).status_code == 401
    assert not is_frozen(root / "user")


def test_a_replaced_agent_keeps_the_workload_frozen_until_its_host_comes(frozen_agent):
    client, hierarchy = frozen_agent
    message = {"process": process("/bin/sh", "-c", "while :; do echo x; sleep 0.05; done")}
    with open_stream(client, "process.Process/Start", message) as response:
        pid = Stream(response).until("start")["pid"]
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/upgrade", headers=HOST)
        assert client.get("/health").status_code == 204
        assert is_frozen(hierarchy / "user")
        assert client.post("/init", headers=HOST).status_code == 204
        assert not is_frozen(hierarchy / "user")
    assert [folder.name for folder in (hierarchy / "user").iterdir() if folder.is_dir()] == ["c-1"]
    call(client, "process.Process/SendSignal", {"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"})
    with open_stream(client, "process.Process/Connect", {"process": {"pid": pid}}) as response:
        end = Stream(response).rest().end
    assert end["record"]["cause"] == "killed"
    assert int(end["record"].get("userCpuUs", 0)) + int(end["record"].get("systemCpuUs", 0)) > 0
    deadline = time.monotonic() + 5
    while any(folder.is_dir() for folder in (hierarchy / "user").iterdir()):
        assert time.monotonic() < deadline, "the group of a command that ended stays"
        time.sleep(0.01)
