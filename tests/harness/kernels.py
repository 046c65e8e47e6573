"""TEMPORARY, until the real one comes."""

import json
from pathlib import Path

VENV = "/tmp/wt/cases-venv"


def specs(folder: Path) -> Path:
    for name, argv, language, mode in (
        ("python3", [f"{VENV}/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "python", "signal"),
        ("deno", [f"{VENV}/bin/deno", "jupyter", "--kernel", "--conn", "{connection_file}"], "typescript", "message"),
        ("bash", [f"{VENV}/bin/python", "-m", "bash_kernel", "-f", "{connection_file}"], "bash", "signal"),
    ):
        spec = folder / name
        spec.mkdir(parents=True)
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": language, "interrupt_mode": mode, "env": {"NO_COLOR": "1"} if name == "deno" else {}, "metadata": {"guestd": {"transport": "tcp"}} if name == "deno" else {}}))
    folder.chmod(0o755)
    return folder
