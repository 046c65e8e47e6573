"""Fixtures: guestd alone with kernels of the tests' own environment, contexts in it, and sandboxes of the template."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from harness import kernels
from harness.code import CodeAgent, Door
from harness.planes import Accounts


@pytest.fixture(scope="session")
def accounts():
    if os.geteuid() != 0:
        pytest.skip("the code door was not tested alone: the agent needs root to run kernels as another user")
    made = Accounts()
    made.require()
    yield made
    made.close()


@pytest.fixture(scope="session")
def kernel_specs():
    """A folder of specs for the kernels that the tests' environment carries, readable by everybody."""
    folder = Path(tempfile.mkdtemp(prefix="kernels-", dir="/tmp"))
    yield kernels.specs(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _interpreter(accounts, kernel_specs, running):
    agent = CodeAgent(kernel_specs, wrapper=accounts.wrapper)
    running.append(agent)
    yield agent.start()
    running.remove(agent)
    agent.close()


@pytest.fixture
def interpreter(_interpreter) -> CodeAgent:
    """One agent for all cases of this test process: they leave its default contexts usable."""
    assert _interpreter.process.poll() is None, f"an earlier case ended the agent:\n{_interpreter.stderr()[-4000:]}"
    return _interpreter


@pytest.fixture
def door(interpreter) -> Door:
    return interpreter.door


@pytest.fixture
def context(door):
    """A context of the case's own: `context("bash")` is its id."""
    made = []

    def create(language: str = "python", **body) -> str:
        created = door.create(language=language, **body)
        made.append(created["id"])
        return created["id"]

    yield create
    for context_id in made:
        door.delete(context_id)


@pytest.fixture
def python(context) -> str:
    return context("python")


@pytest.fixture
def fresh(accounts, kernel_specs, running):
    """Starts an agent of the case's own: `fresh()`, `fresh(specs)`."""
    started = []

    def start(specs: Path = kernel_specs, **init) -> CodeAgent:
        agent = CodeAgent(specs, wrapper=accounts.wrapper)
        running.append(agent)
        started.append(agent)
        agent.start()
        if init:
            agent.init(**init)
        return agent

    yield start
    for agent in started:
        running.remove(agent)
        agent.close()


@pytest.fixture
def home(accounts) -> Path:
    """What the agent's kernels see as /home/user."""
    return accounts.folder / "home/user"
