"""Room for microVMs: all test processes together boot no more than a few at a time, because each is a whole machine under emulation."""

import fcntl
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

SLOTS = int(os.environ.get("TESTS_VM_SLOTS", "6"))
FOLDER = Path("/tmp/guestd-vm-slots")

# For a test whose many microVMs sleep for minutes: it boots two at a time, and takes no slot while they sleep.
two_boots = threading.BoundedSemaphore(2)


class VmSlots:
    """Lock files in a folder that all test processes of a machine share; the kernel frees the locks of a process that dies."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def take(self, count: int):
        assert count <= SLOTS, f"a test asks for {count} microVMs, more than TESTS_VM_SLOTS={SLOTS}"
        held = []
        try:
            # One at a time collects, so two tests never hold half of what both need.
            with open(self.folder / "gate", "w") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                while len(held) < count:
                    held += self._free(count - len(held))
                    time.sleep(0.1)
            yield
        finally:
            for slot in held:
                slot.close()

    def _free(self, wanted: int) -> list:
        found = []
        for number in range(SLOTS):
            slot = open(self.folder / str(number), "w")
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(slot)
            except BlockingIOError:
                slot.close()
            if len(found) == wanted:
                break
        return found
