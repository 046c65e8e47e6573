"""The same walk with every SDK, unmodified and configured by environment variables alone."""

import asyncio
import importlib
import time
from pathlib import Path

import pytest

from harness.programs import run_node

SMOKE = (Path(__file__).parent / "smoke.mjs").read_text()


@pytest.fixture
def configured(containers, monkeypatch):
    """hostd, and the environment pointing to it."""
    for name, value in containers.environment().items():
        monkeypatch.setenv(name, value)
    return containers


@pytest.mark.parametrize(
    "package, domain",
    [
        ("e2b", {}),
        ("e2b_code_interpreter", {}),
        ("novita_sandbox.core", {}),
        ("novita_sandbox.core", {"NOVITA_DOMAIN": "sandbox.novita.ai"}),
        ("novita_sandbox.code_interpreter", {}),
        ("ppio_sandbox.core", {}),
        ("ppio_sandbox.core", {"PPIO_DOMAIN": "local.test"}),
        ("ppio_sandbox.code_interpreter", {}),
    ],
    ids=["e2b", "e2b-ci", "novita", "novita-legacy", "novita-ci", "ppio-legacy", "ppio-modern", "ppio-ci"],
)
def test_a_python_sdk_walks_through(configured, monkeypatch, package, domain):
    for name, value in domain.items():
        monkeypatch.setenv(name, value)
    sdk = importlib.import_module(package)
    Sandbox = sdk.Sandbox

    sandbox = Sandbox.create(timeout=120, metadata={"walk": package})
    assert sandbox.is_running() is True
    done = sandbox.commands.run("echo out; echo err >&2; id -un")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "out\nuser\n", "err\n")
    with pytest.raises(Exception) as failure:
        sandbox.commands.run("exit 3")
    assert failure.value.exit_code == 3

    text = "grüße " * 100_000
    sandbox.files.write("walk/file.txt", text)
    assert sandbox.files.read("walk/file.txt") == text
    assert [entry.name for entry in sandbox.files.list("walk")] == ["file.txt"]
    assert sandbox.files.exists("walk/none") is False
    sandbox.files.remove("walk")

    command = sandbox.commands.run("sleep 100", background=True)
    assert command.pid in [found.pid for found in sandbox.commands.list()]
    assert sandbox.commands.kill(command.pid) is True
    assert sandbox.commands.kill(command.pid) is False

    joined = Sandbox.connect(sandbox.sandbox_id)
    assert joined.commands.run("echo joined").stdout == "joined\n"
    assert joined.is_running() is True

    sandbox.set_timeout(600)
    info = sandbox.get_info()
    assert info.end_at.timestamp() - time.time() == pytest.approx(600, abs=2)
    assert info.metadata == {"walk": package}
    assert info.sandbox_id.split("-")[0] == sandbox.sandbox_id.split("-")[0]

    assert sandbox.kill() is True
    assert sandbox.is_running() is False
    assert joined.is_running() is False
    with pytest.raises(Exception, match="(?i)not found|timeout"):
        joined.commands.run("true")
    assert Sandbox.kill(sandbox.sandbox_id) is False


@pytest.mark.parametrize("package", ["e2b", "novita_sandbox.core", "ppio_sandbox.core"])
def test_a_python_sdk_lists(configured, package):
    sdk = importlib.import_module(package)
    sandboxes = [sdk.Sandbox.create(metadata={"n": str(n), "of": package}) for n in range(3)]
    pages = sdk.Sandbox.list(query=sdk.SandboxQuery(metadata={"of": package}), limit=2)
    found = []
    while pages.has_next:
        found += pages.next_items()
    assert {info.sandbox_id.split("-")[0] for info in found} == {each.sandbox_id.split("-")[0] for each in sandboxes}


@pytest.mark.parametrize("package", ["e2b", "novita_sandbox.core", "ppio_sandbox.core"])
def test_a_python_sdk_raises_its_own_error_for_a_wrong_idle_timeout(configured, package):
    sdk = importlib.import_module(package)
    with pytest.raises(sdk.SandboxException, match="400.*idle_timeout"):
        sdk.Sandbox.create(metadata={"idle_timeout": "59"})


@pytest.mark.parametrize("package", ["e2b", "novita_sandbox.core", "ppio_sandbox.core"])
def test_an_async_python_sdk_walks_through(configured, package):
    AsyncSandbox = importlib.import_module(package).AsyncSandbox

    async def walk() -> None:
        sandbox = await AsyncSandbox.create(timeout=120)
        assert await sandbox.is_running() is True
        answers = await asyncio.gather(*(sandbox.commands.run(f"echo {n}") for n in range(20)))
        assert [answer.stdout for answer in answers] == [f"{n}\n" for n in range(20)]
        await sandbox.files.write("/tmp/file", "async")
        assert await sandbox.files.read("/tmp/file") == "async"
        command = await sandbox.commands.run("cat", background=True, stdin=True)
        await sandbox.commands.send_stdin(command.pid, "fed\n")
        assert await sandbox.commands.kill(command.pid) is True
        joined = await AsyncSandbox.connect(sandbox.sandbox_id)
        assert (await joined.commands.run("echo joined")).stdout == "joined\n"
        assert await sandbox.kill() is True
        assert await sandbox.is_running() is False

    asyncio.run(walk())


@pytest.mark.parametrize(
    "sdk", ["e2b", "@e2b/code-interpreter", "novita-sandbox", "novita-sandbox/code-interpreter"]
)
def test_a_javascript_sdk_walks_through(containers, sdk):
    assert run_node(SMOKE, {**containers.environment(), "SDK": sdk}, within=90).endswith("walked\n")
