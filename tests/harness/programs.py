"""Programs that use an SDK as its users do: a file, an environment, an exit code."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import locations

# What an asynchronous program with the E2B SDK ends with, lest the interpreter be taken apart under the threads of the SDK's HTTP library: the
# one that told the event loop of the last answer aborts the process when it comes back to an interpreter that is leaving (pyqwest 0.12.0).
LEAVE = "\nimport os\nos._exit(0)\n"


def run_python(source: str, environment: dict, within: float, through: tuple[str, ...] = ()) -> str:
    """The standard output of a program that must succeed; `through` are words before its command."""
    with tempfile.TemporaryDirectory(prefix="program-", dir="/tmp") as folder:
        script = Path(folder) / "program.py"
        script.write_text(source)
        return _run([*through, sys.executable, "-u", str(script)], environment, within)


def run_node(source: str, environment: dict, within: float, through: tuple[str, ...] = ()) -> str:
    """The same for an ES module, which finds packages only in a `node_modules` above itself."""
    node = shutil.which("node")
    assert node, "node is not on PATH"
    with tempfile.TemporaryDirectory(prefix="program-", dir="/tmp") as folder:
        (Path(folder) / "node_modules").symlink_to(locations.node_modules())
        script = Path(folder) / "program.mjs"
        script.write_text(source)
        return _run([*through, node, str(script)], environment, within)


def run_deno(source: str, environment: dict, within: float, arguments: tuple[str, ...] = ()) -> str:
    """The same for a TypeScript program under the Deno runtime, which comes from its npm package."""
    with tempfile.TemporaryDirectory(prefix="program-", dir="/tmp") as folder:
        (Path(folder) / "node_modules").symlink_to(locations.node_modules())
        script = Path(folder) / "program.ts"
        script.write_text(source)
        return _run([*deno(), *arguments, str(script)], {**deno_environment(folder), **environment}, within)


def deno() -> list[str]:
    """How to run a program that uses packages of `node_modules`."""
    return [str(deno_binary()), "run", "--quiet", "--allow-all", "--node-modules-dir=manual"]


def deno_binary() -> Path:
    """The runtime of the PyPI package: npm's lock file of its own package does not install on another platform."""
    found = Path(sys.executable).parent / "deno"
    assert found.exists(), "the deno runtime is not beside Python: tests/requirements.txt installs it"
    return found


def deno_environment(folder: str) -> dict:
    """Nothing of the user's, and nothing from the network."""
    return {"DENO_DIR": f"{folder}/.deno", "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}


def _run(command: list[str], environment: dict, within: float) -> str:
    vendors = ("E2B_", "NOVITA_", "PPIO_", "DENO_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(vendors)}
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=within)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
