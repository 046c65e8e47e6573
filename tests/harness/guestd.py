"""guestd alone, as an ordinary process on the loopback interface."""

import socket
import subprocess
import tempfile
from pathlib import Path

import httpx

from harness import locations, processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Guestd:
    def __init__(self, *arguments: str, wrapper: list[str] | None = None):
        """`wrapper`: words before the program's own, which must end by executing what follows them."""
        self.wrapper = wrapper or []
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments = arguments
        self.log = Path(tempfile.mkstemp(prefix="guestd-", suffix=".stderr", dir="/tmp")[1])

    def start(self) -> "Guestd":
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, str(locations.guestd()), "serve", "--port", str(self.port), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        processes.wait_until(self._answers, within=10, what=f"guestd answers on {self.url}")
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"guestd ended with code {self.process.returncode}:\n{self.stderr()}"
        try:
            return httpx.get(f"{self.url}/health", trust_env=False, timeout=2).status_code == 204
        except httpx.TransportError:
            return False

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30, **options)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.log.unlink()

    def stderr(self) -> str:
        return self.log.read_text(errors="replace")
