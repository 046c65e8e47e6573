"""The kernels of the template `code-interpreter-v1`, on the machine under the tests: the same specs and the same startup
module, with the programs of the tests' own environment. A kernel is ready in half a second, where an emulated microVM
takes half a minute."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from harness import locations

TEMPLATE = locations.REPOSITORY / "rootfs/code-interpreter-v1"
FILES = TEMPLATE / "files"
# Not resolved: the environment is where the link to Python is.
PROGRAMS = Path(sys.executable).parent


def specs(folder: Path, for_others: bool = True) -> Path:
    """Makes `folder` a folder of kernel specs (python3, deno, bash) for `guestd --kernels` and returns it.

    Whoever runs the kernels must be able to read it and the tests' environment, but not this repository.
    """
    programs = PROGRAMS
    if for_others:
        if closed := _closed(Path(sys.executable).resolve().parent):
            pytest.fail(
                f"no kernel can run as another user: {closed} is closed to others, and {sys.executable} needs it. "
                "Make the tests' environment with /usr/bin/python3, as `cargo xtask test` does",
                pytrace=False,
            )
        if _closed(PROGRAMS):
            # This repository lies where others cannot go: the environment is linked to where they can.
            linked = subprocess.run(["cp", "-al", PROGRAMS.parent, folder / "environment"], capture_output=True)
            if linked.returncode != 0:
                shutil.rmtree(folder / "environment", ignore_errors=True)
                subprocess.run(["cp", "-a", PROGRAMS.parent, folder / "environment"], check=True)
            programs = folder / "environment/bin"
    for source in sorted((FILES / "kernels").glob("*/kernel.json")):
        target = folder / source.parent.name
        target.mkdir(parents=True, exist_ok=True)
        spec = json.loads(source.read_text())
        program = Path(spec["argv"][0]).name
        spec["argv"][0] = str(programs / ("python" if program == "python3" else program))
        assert Path(spec["argv"][0]).exists(), f"{spec['argv'][0]} is missing: tests/requirements.txt has it"
        # Where the image has our modules, Python and IPython find them by themselves.
        modules = {"python": "guestd_results", "bash": "guestd_bash.py"}.get(spec["language"])
        if modules and (FILES / modules).is_dir():
            shutil.copytree(FILES / modules, target / modules, ignore=shutil.ignore_patterns("__pycache__"))
        elif modules:
            shutil.copy(FILES / modules, target)
        if spec["language"] == "python":
            config = shutil.copy(FILES / "ipython_kernel_config.py", target)
            spec["argv"].append(f"--config={config}")
        if modules:
            spec.setdefault("env", {})["PYTHONPATH"] = str(target)
        (target / "kernel.json").write_text(json.dumps(spec, indent=1))
    for path in (folder, *(path for path in folder.rglob("*") if folder / "environment" not in path.parents)):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def _closed(place: Path) -> Path | None:
    """The first folder on the way to `place` that others cannot enter."""
    return next((path for path in (place, *place.parents) if not path.stat().st_mode & stat.S_IXOTH), None)
