"""hostd as an operator runs it: a process with flags, a data folder and two listeners."""

import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from harness import locations, processes

API_KEY = "e2b_" + "0" * 40
READY = re.compile(r"^ready api=(\S+) proxy=(\S+)(?: tls=https://(\S+))?$")
TLS_DOMAIN = "sbx.localhost"
START_DEADLINE = 60
STOP_DEADLINE = 45


class HostdExited(AssertionError):
    """hostd ended before it served."""

    def __init__(self, code: int, stderr: str):
        super().__init__(f"hostd ended with code {code} before it was ready:\n{stderr}")
        self.code = code
        self.stderr = stderr


class Hostd:
    """One hostd and its data folder, which outlives the process so that a restart can adopt it."""

    def __init__(self, runtime: str = "container", *, data: Path | None = None, environment: dict | None = None, **flags):
        # A short path: the sockets below it must fit in 108 bytes.
        self.data = data or Path(tempfile.mkdtemp(prefix="hostd-", dir="/tmp"))
        # Another's data folder is another's to clear.
        self.owns_data = data is None
        self.flags = {"runtime": runtime, "images": locations.images(), **flags}
        if runtime == "qemu":
            self.flags.setdefault("accel", os.environ.get("TESTS_ACCEL", "auto"))
            self.flags.setdefault("link", os.environ.get("TESTS_LINK", "auto"))
            self.flags.setdefault("vhost_device_vsock", locations.vhost_device_vsock())
        self.extra_environment = environment or {}
        self.api_key = flags.get("api_key", API_KEY)
        self.log = Path(tempfile.mkstemp(prefix="hostd-", suffix=".stderr", dir="/tmp")[1])
        self.process = None
        self.api_url = "http://127.0.0.1:0"
        self.proxy_url = "http://127.0.0.1:0"
        # With `tls_listen`: where that is.
        self.tls_address = None

    # --- the process ---

    def command(self) -> list[str]:
        words = [str(locations.hostd()), "serve", "--data", str(self.data)]
        words += ["--api", urlsplit(self.api_url).netloc, "--proxy", urlsplit(self.proxy_url).netloc]
        for name, value in self.flags.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def start(self) -> "Hostd":
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.extra_environment},
            )
        self.api_url, self.proxy_url, self.tls_address = self._wait_until_ready()
        if self.tls_address:
            # A restart takes the same one.
            self.flags["tls_listen"] = self.tls_address
        self.client = httpx.Client(base_url=self.api_url, headers={"X-API-KEY": self.api_key}, timeout=70, trust_env=False)
        return self

    def _wait_until_ready(self) -> tuple[str, str, str | None]:
        lines = queue.Queue()
        process = self.process

        def read():
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        deadline = time.monotonic() + START_DEADLINE
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.kill9()
                raise AssertionError(f"hostd was not ready within {START_DEADLINE} s:\n{self.stderr()}") from None
            if line is None:
                raise HostdExited(process.wait(10), self.stderr())
            if found := READY.match(line.strip()):
                return found[1], found[2], found[3]

    def kill9(self) -> None:
        """hostd dies; its sandboxes stay."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def restart(self) -> "Hostd":
        """The same data folder and the same ports."""
        if self.process.poll() is None:
            self.terminate()
        return self.start()

    def terminate(self) -> int:
        """As a service manager stops it; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_DEADLINE)

    def close(self) -> None:
        """Ends everything that this hostd started, and fails when hostd itself should have and had not."""
        orderly = self.process is not None and self.process.poll() is None
        try:
            if orderly:
                self.end_sandboxes()
                self.terminate()
        finally:
            if self.process is not None and self.process.poll() is None:
                self.kill9()
            left = self._clear(within=5 if orderly else 0) if self.owns_data else []
            said = self.stderr()
            self.log.unlink(missing_ok=True)
        assert not (orderly and left), f"hostd left behind: {left}\n{said[-20_000:]}"

    def leftovers(self) -> list[str]:
        """Processes, containers and mounts of this data folder."""
        found = [f"{pid}: {command}" for pid, command in processes.belonging_to(self.data).items()]
        return found + processes.mounted_below(self.data)

    def _clear(self, within: float) -> list[str]:
        """Removes the data folder and whatever still uses it; tells what that was."""
        deadline = time.monotonic() + within
        while (left := self.leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in processes.belonging_to(self.data):
            processes.end(pid)
        for point in processes.mounted_below(self.data):
            subprocess.run(["umount", "--lazy", point], check=False)
        # Never through a mount: below one may be the image itself.
        if not processes.mounted_below(self.data):
            shutil.rmtree(self.data, ignore_errors=True)
        return left

    def guards(self) -> dict[str, int]:
        """The guard of each sandbox, by sandbox id."""
        found = {}
        for file in (self.data / "run").glob("*/guard.pid"):
            try:
                found[file.parent.name] = int(file.read_text())
            except (OSError, ValueError):
                continue
        return found

    def stderr(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    # --- the control plane ---

    def request(self, method: str, path: str, **options) -> httpx.Response:
        return self.client.request(method, path, **options)

    def create(self, version: str = "/v2", **body) -> dict:
        answer = self.request("POST", f"{version}/sandboxes", json={"templateID": "base", **body})
        assert answer.status_code == 201, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def info(self, sandbox_id: str) -> dict:
        answer = self.request("GET", f"/sandboxes/{sandbox_id}")
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def sandboxes(self) -> list[str]:
        answer = self.request("GET", "/v2/sandboxes")
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return [sandbox["sandboxID"] for sandbox in answer.json()]

    def end_sandboxes(self) -> None:
        for sandbox_id in self.sandboxes():
            self.request("DELETE", f"/sandboxes/{sandbox_id}")

    # --- the admin view, which never counts as activity ---

    def explain(self, sandbox_id: str) -> dict:
        answer = self.request("GET", f"/sandboxes/{sandbox_id}/idle")
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def tombstone(self, sandbox_id: str) -> dict | None:
        """When, why and with which holds it ended; None while it lives."""
        return self.explain(sandbox_id)["ended"]

    def wait_until_ended(self, sandbox_id: str, within: float) -> tuple[float, dict]:
        """When the first answer said so, on this process's monotonic clock, and the tombstone."""
        deadline = time.monotonic() + within
        while True:
            told = self.explain(sandbox_id)
            now = time.monotonic()
            if told["state"] == "ended":
                return now, told["ended"]
            assert now < deadline, f"still {told['state']} after {within} s: {told}"
            time.sleep(0.05)

    # --- for the SDKs (recipe R-A of contracts/control-plane.md 2.7) ---

    def sdk(self) -> dict:
        """Options for each call of a Python SDK."""
        return {"api_key": self.api_key, "api_url": self.api_url, "sandbox_url": self.proxy_url}

    def environment(self) -> dict:
        """The environment of a program that uses any SDK."""
        return {
            f"{vendor}_{name}": value
            for vendor in ("E2B", "NOVITA", "PPIO")
            for name, value in (("API_KEY", self.api_key), ("API_URL", self.api_url), ("SANDBOX_URL", self.proxy_url))
        }

    # --- for the SDKs, over TLS (recipe R-B) ---

    @property
    def authority(self) -> Path:
        """What clients have to trust."""
        return self.data / "tls" / TLS_DOMAIN / "ca.pem"

    def tls_environment(self) -> dict:
        """The environment of a program that knows a domain, a key and an authority, and no address."""
        domain = f"{TLS_DOMAIN}:{self.tls_address.rpartition(':')[2]}"
        keys = {
            f"{vendor}_{name}": value
            for vendor in ("E2B", "NOVITA", "PPIO")
            for name, value in (("API_KEY", self.api_key), ("DOMAIN", domain))
        }
        return {**keys, "SSL_CERT_FILE": str(self.authority), "NODE_EXTRA_CA_CERTS": str(self.authority)}

    # --- the data plane, as bytes ---

    @contextmanager
    def plane(self, sandbox: dict, port: int = 49983, **options):
        """A client of one sandbox: routing headers and access token as the E2B SDK sends them."""
        headers = {
            "E2b-Sandbox-Id": sandbox["sandboxID"],
            "E2b-Sandbox-Port": str(port),
            "X-Access-Token": sandbox["envdAccessToken"],
        }
        with httpx.Client(base_url=self.proxy_url, headers=headers, timeout=20, trust_env=False, **options) as client:
            yield client
