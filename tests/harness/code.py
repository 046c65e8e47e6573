"""The code interpreter's door as bytes: cells, contexts, kept executions (contract: envd.md section 7)."""

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from harness import processes
from harness.connect import call
from harness.guestd import Guestd, free_port
from harness.hostd import API_KEY

CONTROL = {"X-Guestd-Control": "host"}
# Asks the processor, and not a timer, whether a cell can be interrupted.
SPIN = "print('go', flush=True)\nwhile True: pass"


@dataclass
class Cell:
    """What one stream of events told, and when each event arrived on this process's monotonic clock."""

    events: list[dict] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    headers: httpx.Headers | None = None

    def of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def order(self) -> list[str]:
        """The types in order; a keepalive depends on the machine's speed."""
        return [event["type"] for event in self.events if event["type"] != "keepalive"]

    @property
    def stdout(self) -> str:
        return "".join(event["text"] for event in self.of("stdout"))

    @property
    def stderr(self) -> str:
        return "".join(event["text"] for event in self.of("stderr"))

    @property
    def results(self) -> list[dict]:
        return self.of("result")

    @property
    def text(self) -> str | None:
        """The main result as text."""
        return next((result.get("text") for result in self.results if result["is_main_result"]), None)

    @property
    def error(self) -> dict | None:
        assert len(self.of("error")) <= 1, f"several errors: {self}"
        return next(iter(self.of("error")), None)

    @property
    def count(self) -> int | None:
        return next((event["execution_count"] for event in self.of("number_of_executions")), None)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1]["type"] == "end_of_execution"

    def take(self, line: bytes) -> dict:
        event = json.loads(line)
        self.events.append(event)
        self.at.append(time.monotonic())
        return event

    def checked(self) -> "Cell":
        """A whole cell: exactly one end, at the end."""
        assert self.ended and len(self.of("end_of_execution")) == 1, f"no proper end: {self}"
        return self

    def ok(self) -> "Cell":
        assert self.checked().error is None, f"it failed: {self.error}"
        return self

    def failed(self) -> dict:
        """The error of a cell that must have one."""
        error = self.checked().error
        assert error is not None, f"it succeeded: {self}"
        assert all(isinstance(error[name], str) for name in ("name", "value", "traceback")), error
        return error

    def __str__(self) -> str:
        return " ".join(json.dumps(event)[:300] for event in self.events[-20:])


class Running:
    """A cell that is read event by event."""

    def __init__(self, response: httpx.Response):
        self.response = response
        self.cell = Cell(headers=response.headers)
        self.lines = self._split()

    def _split(self):
        # Not httpx's iter_lines, which splits at every line end that Unicode knows.
        left = bytearray()
        for piece in self.response.iter_raw():
            searched = len(left)
            left += piece
            while (end := left.find(b"\n", searched)) >= 0:
                yield bytes(left[:end])
                del left[: end + 1]
                searched = 0
        assert not left, f"the stream ended inside a line: {bytes(left[:200])!r}"

    def __iter__(self):
        for line in self.lines:
            yield self.cell.take(line)

    def until(self, kind: str) -> dict:
        for event in self:
            if event["type"] == kind:
                return event
        raise AssertionError(f"no {kind}: {self.cell}")

    def rest(self) -> Cell:
        for _ in self:
            pass
        return self.cell

    def leave(self) -> None:
        """The client vanishes in the middle."""
        self.response.close()


def refused(answer: httpx.Response) -> tuple[int, str]:
    assert answer.status_code >= 400, f"{answer.status_code}: it was accepted"
    return answer.status_code, answer.text


class Door:
    """A client of the code door; `http` sends what the SDKs send."""

    def __init__(self, url: str, headers: dict | None = None):
        self.url = url
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=100)
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False, limits=limits)

    def close(self) -> None:
        self.http.close()

    # --- cells ---

    @contextmanager
    def begin(self, code: str, *, path: str = "/execute", method: str = "POST", **body):
        """A running cell, of which nothing has been read."""
        with self.http.stream(method, path, json={"code": code, **body} if method == "POST" else None) as response:
            if response.status_code != 200:
                response.read()
            assert response.status_code == 200, f"{response.status_code}: {response.text}"
            yield Running(response)

    def execute(self, code: str, **body) -> Cell:
        """A cell to its end, however it ends."""
        with self.begin(code, **body) as running:
            return running.rest().checked()

    def run(self, code: str, **body) -> Cell:
        """A cell that must succeed."""
        return self.execute(code, **body).ok()

    def ask(self, **body) -> httpx.Response:
        """A call of /execute that may be refused; the whole answer."""
        return self.http.post("/execute", json=body)

    # --- contexts ---

    def contexts(self) -> list[dict]:
        answer = self.http.get("/contexts")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def create(self, **body) -> dict:
        answer = self.http.post("/contexts", json=body)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def restart(self, context_id: str) -> httpx.Response:
        return self.http.post(f"/contexts/{context_id}/restart")

    def interrupt(self, context_id: str) -> httpx.Response:
        return self.http.post(f"/contexts/{context_id}/interrupt")

    def delete(self, context_id: str) -> httpx.Response:
        return self.http.delete(f"/contexts/{context_id}")

    # --- executions that outlive their client ---

    def detach(self, code: str, **body) -> dict:
        answer = self.http.post("/executions", json={"code": code, **body})
        assert answer.status_code == 201, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def execution(self, execution_id: str) -> dict:
        answer = self.http.get(f"/executions/{execution_id}")
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def executions(self) -> list[dict]:
        answer = self.http.get("/executions")
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return answer.json()

    def follow(self, execution_id: str, **query):
        """A context manager: the events of a kept execution, followed to its end."""
        words = "&".join(f"{name}={value}" for name, value in query.items())
        return self.begin("", method="GET", path=f"/executions/{execution_id}/events{'?' if words else ''}{words}")

    def events(self, execution_id: str, **query) -> Cell:
        with self.follow(execution_id, **query) as running:
            return running.rest()

    def wait_done(self, execution_id: str, within: float = 20) -> dict:
        def done() -> dict | None:
            told = self.execution(execution_id)
            return told if told["state"] == "done" else None

        return processes.wait_until(done, within, f"execution {execution_id} is done")


class CodeAgent(Guestd):
    """guestd alone with a code door whose kernels come from `kernels`; ready for SDKs in debug mode."""

    def __init__(self, kernels: Path | str, *arguments: str, wrapper: list[str] | None = None):
        self.code_port = free_port()
        self.code_url = f"http://127.0.0.1:{self.code_port}"
        super().__init__("--code-port", str(self.code_port), "--kernels", str(kernels), *arguments, wrapper=wrapper)

    def start(self) -> "CodeAgent":
        super().start()
        self.init()
        self.door = Door(self.code_url)
        processes.wait_until(self._code_door, within=20, what=f"the code door answers on {self.code_url}")
        return self

    def init(self, **body) -> None:
        answer = httpx.post(f"{self.url}/init", json={"defaultUser": "user", **body}, headers=CONTROL, trust_env=False)
        assert answer.status_code == 204, answer.text

    def _code_door(self) -> bool:
        assert self.process.poll() is None, f"guestd ended with code {self.process.returncode}:\n{self.stderr()}"
        try:
            return self.door.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    # --- what it uses ---

    def memory(self) -> int:
        """What the agent itself keeps in memory, in bytes."""
        for line in Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no Rss in smaps_rollup")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def report(self) -> dict:
        """What holds the sandbox, as the host asks for it."""
        with self.client() as client:
            return call(client, "activity.v1.Activity/Get", headers=CONTROL).json()

    def holds(self) -> list[str]:
        return [hold["class"] for hold in self.report().get("holds", []) if hold.get("counts")]

    # --- for the SDKs ---

    @property
    def sdk_options(self) -> dict:
        """Everything that these objects call goes to the code door, `is_running` included."""
        return {"debug": True, "sandbox_url": self.code_url, "api_key": API_KEY}

    @property
    def environment(self) -> dict:
        return {"E2B_DEBUG": "true", "E2B_SANDBOX_URL": self.code_url, "E2B_API_KEY": API_KEY}

    def close(self) -> None:
        if hasattr(self, "door"):
            self.door.close()
        super().close()
