"""An SDK in debug mode talks to the agent alone, without any control plane: how a template is tried out."""

import pytest
from e2b import Sandbox

from harness.hostd import API_KEY
from harness.programs import run_node


def test_the_python_sdk_in_debug_mode(guestd, tmp_path):
    sandbox = Sandbox.create(debug=True, sandbox_url=guestd.url, api_key=API_KEY)
    assert sandbox.is_running() is True
    assert sandbox.commands.run("echo alone", cwd="/").stdout == "alone\n"
    sandbox.files.write(f"{tmp_path}/file", "x")
    assert (tmp_path / "file").read_text() == "x"
    assert sandbox.files.read(f"{tmp_path}/file") == "x"


@pytest.mark.parametrize("sdk", ["e2b", "@e2b/code-interpreter"])
def test_the_javascript_sdk_in_debug_mode(guestd, tmp_path, sdk):
    program = f"""
        import {{ Sandbox }} from '{sdk}'
        const sandbox = await Sandbox.create()
        await sandbox.files.write('{tmp_path}/file', 'x')
        console.log(await sandbox.isRunning(), (await sandbox.commands.run('cat {tmp_path}/file')).stdout)
    """
    environment = {"E2B_DEBUG": "true", "E2B_SANDBOX_URL": guestd.url, "E2B_API_KEY": API_KEY}
    assert run_node(program, environment, within=30) == "true x\n"
