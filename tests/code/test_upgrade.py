"""Another agent takes the place of the one that runs cells: kernels and what they know stay."""

import json

import httpx
import pytest

from harness import processes
from harness.code import CONTROL, CodeAgent


@pytest.fixture
def agent(accounts, kernel_specs, running, tmp_path):
    (tmp_path / "usr/bin").mkdir(parents=True)
    agent = CodeAgent(kernel_specs, "--root", str(tmp_path), wrapper=accounts.wrapper)
    running.append(agent)
    yield agent.start()
    running.remove(agent)
    agent.close()


def upgrade(agent: CodeAgent) -> httpx.Response | None:
    """The answer of a refused upgrade; None when the connection was dropped, which is success."""
    try:
        return httpx.post(f"{agent.url}/upgrade", headers=CONTROL, trust_env=False, timeout=60)
    except httpx.TransportError:
        return None


def test_contexts_and_what_their_kernels_know_outlive_the_agent(agent):
    door = agent.door
    door.run("x = 41")
    mine = door.create(language="python", cwd="/tmp")["id"]
    door.run("import os; y = os.getcwd()", context_id=mine)
    before = door.contexts()
    kernel = door.run("os.getpid()", context_id=mine).text

    assert upgrade(agent) is None
    agent.init()
    processes.wait_until(agent._code_door, within=20, what="the new agent answers")
    assert door.contexts() == before
    assert door.run("x + 1").text == "42"
    cell = door.run("print(y, os.getpid())", context_id=mine)
    assert cell.stdout == f"/tmp {kernel}\n" and not cell.stderr
    assert door.delete(mine).status_code == 200
    processes.wait_until(lambda: not processes_of(int(kernel)), within=5, what="the deleted context's kernel is gone")


def processes_of(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_an_upgrade_in_the_middle_of_a_cell_is_refused_and_the_cell_goes_on(agent):
    door = agent.door
    door.run("import time")
    with door.begin("print('go', flush=True)\ntime.sleep(2)\n'whole'") as running:
        running.until("stdout")
        refused = upgrade(agent)
        assert refused is not None and refused.status_code == 409, refused
        assert refused.text == "a code cell or the start of a kernel is under way"
        cell = running.rest()
    assert json.dumps(cell.results[0]["text"]) == '"whole"' and cell.error is None
