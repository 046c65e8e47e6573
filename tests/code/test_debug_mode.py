"""The vendors' SDKs in debug mode, which talk to localhost:49983 and localhost:49999: the agent has a network of its own here."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness import locations, processes
from harness.code import CONTROL
from harness.hostd import API_KEY

PYTHON = """
from {module} import Sandbox
import time
sandbox = Sandbox.create({options})
print(sandbox.run_code("x = 40; x + 2").text)
told = []
sandbox.run_code("print('a', flush=True); 1/0", on_stdout=lambda m: told.append(m.line), on_error=lambda e: told.append(e.name))
print(told)
made = sandbox.create_code_context(cwd="/tmp", language="bash")
print(sandbox.run_code("pwd", context=made).logs.stdout)
print(sandbox.commands.run("echo command").stdout.strip())
try:
    sandbox.run_code("while True: pass", timeout=1)
except Exception as error:
    print(type(error).__name__)
print(sandbox.run_code("x").text)
"""
SEEN = "42\n['a\\n', 'ZeroDivisionError']\n['/tmp\\n']\ncommand\nTimeoutException\n40\n"
NODE = """
import {{ Sandbox }} from '{module}'
const sandbox = await Sandbox.create()
console.log((await sandbox.runCode('x = 40; x + 2')).text)
const told = []
await sandbox.runCode("print('a', flush=True); 1/0", {{ onStdout: (m) => {{ told.push(m.line) }}, onError: (e) => {{ told.push(e.name) }} }})
console.log(JSON.stringify(told))
console.log((await sandbox.runCode('console.log(40 + 2)', {{ language: 'js' }})).logs.stdout)
process.exit(0)
"""


@pytest.fixture(scope="module")
def inside(accounts, kernel_specs, running):
    """Runs a program where localhost is the agent's, on the ports that SDKs expect."""
    log = Path(tempfile.mkstemp(prefix="guestd-", suffix=".stderr", dir="/tmp")[1])
    network = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    command = [*network, *accounts.wrapper, str(locations.guestd()), "serve", "--port", "49983", "--kernels", str(kernel_specs)]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def run(words: list[str], environment: dict | None = None, within: float = 60) -> str:
        entered = ["nsenter", f"--net=/proc/{process.pid}/ns/net", "env", *(f"{k}={v}" for k, v in (environment or {}).items())]
        done = subprocess.run([*entered, *words], capture_output=True, text=True, timeout=within)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{log.read_text()[-4000:]}"
        return done.stdout

    def ask(path: str, *options: str) -> str:
        return run(["curl", "--silent", "--max-time", "5", "--fail-with-body", *options, f"http://localhost:{path}"])

    def answers() -> bool:
        assert process.poll() is None, f"guestd ended with code {process.returncode}:\n{log.read_text()}"
        try:
            return ask("49999/health") == '"OK"'
        except AssertionError:
            return False

    try:
        processes.wait_until(answers, within=15, what="the code door answers on its usual port")
        header = next(f"{name}: {value}" for name, value in CONTROL.items())
        ask("49983/init", "-X", "POST", "-H", header, "-H", "Content-Type: application/json", "-d", '{"defaultUser": "user"}')
        yield run
    finally:
        process.terminate()
        process.wait(15)
        log.unlink()


def environment(vendor: str) -> dict:
    return {f"{vendor}_DEBUG": "true", f"{vendor}_API_KEY": API_KEY}


@pytest.mark.takes(6)
@pytest.mark.parametrize(
    "vendor, module",
    [("E2B", "e2b_code_interpreter"), ("NOVITA", "novita_sandbox.code_interpreter"), ("PPIO", "ppio_sandbox.code_interpreter")],
)
def test_the_python_sdk_runs_code_on_the_usual_ports(inside, tmp_path, vendor, module):
    program = tmp_path / "program.py"
    # Its create() does not know the variable.
    program.write_text(PYTHON.format(module=module, options="" if vendor == "E2B" else "debug=True"))
    assert inside([sys.executable, "-u", str(program)], environment(vendor)) == SEEN


@pytest.mark.takes(6)
@pytest.mark.parametrize("vendor, module", [("E2B", "@e2b/code-interpreter"), ("NOVITA", "novita-sandbox/code-interpreter")])
def test_the_javascript_sdk_runs_code_on_the_usual_ports(inside, tmp_path, vendor, module):
    (tmp_path / "node_modules").symlink_to(locations.node_modules())
    program = tmp_path / "program.mjs"
    program.write_text(NODE.format(module=module))
    seen = inside(["node", str(program)], environment(vendor))
    assert seen == '42\n["a\\n","ZeroDivisionError"]\n[ \'42\\n\' ]\n'
