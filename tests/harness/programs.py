"""Programs that use an SDK as its users do: a file, an environment, an exit code."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import locations


def run_python(source: str, environment: dict, within: float) -> str:
    """The standard output of a program that must succeed."""
    with tempfile.TemporaryDirectory(prefix="program-", dir="/tmp") as folder:
        script = Path(folder) / "program.py"
        script.write_text(source)
        return _run([sys.executable, "-u", str(script)], environment, within)


def run_node(source: str, environment: dict, within: float) -> str:
    """The same for an ES module, which finds packages only in a `node_modules` above itself."""
    node = shutil.which("node")
    assert node, "node is not on PATH"
    with tempfile.TemporaryDirectory(prefix="program-", dir="/tmp") as folder:
        (Path(folder) / "node_modules").symlink_to(locations.node_modules())
        script = Path(folder) / "program.mjs"
        script.write_text(source)
        return _run([node, str(script)], environment, within)


def _run(command: list[str], environment: dict, within: float) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("E2B_", "NOVITA_", "PPIO_"))}
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=within)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
