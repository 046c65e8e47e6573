"""Which processes are there, read from /proc."""

import json
import os
import signal
import time
from pathlib import Path


def alive(pid: int) -> bool:
    """A zombie is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def belonging_to(folder: Path) -> dict[int, str]:
    """Processes that name a folder on their command line or run in it, and the containers whose state is kept there."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            runs_in = os.readlink(entry / "cwd")
        except OSError:
            continue
        if (f"{folder}" in command or runs_in.startswith(f"{folder}/")) and alive(int(entry.name)):
            found[int(entry.name)] = command
    for state in folder.glob("runc/*/state.json"):
        try:
            pid = json.loads(state.read_text())["init_process_pid"]
        except (OSError, ValueError, KeyError):
            continue
        if alive(pid):
            found[pid] = f"the first process of container {state.parent.name}"
    return found


def mounted_below(folder: Path) -> list[str]:
    """Mount points, the deepest first."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True)


def wait_until(condition, within: float, what: str, poll: float = 0.05):
    """The first truthy answer of `condition`."""
    deadline = time.monotonic() + within
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(poll)


def end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
