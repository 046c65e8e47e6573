"""Two ways to the same agent, so that one case can be tried on both: guestd alone, and guestd in a microVM through hostd."""

import base64
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from harness import proto
from harness.connect import END, JSON_STREAM, PROTO_STREAM, Ran, Stream, envelope, frames, open_stream, process
from harness.guestd import Guestd
from harness.hostd import API_KEY, Hostd

HOME = "/home/user"


class Accounts:
    """The accounts of a guest image, for an agent that runs on the machine of the tests.

    The agent gets a mount namespace of its own, in which /etc/passwd and /etc/group name `user`, and /home is a folder of the test's:
    it answers like one in a guest, and nothing of the machine is changed.
    """

    PASSWD = (
        "root:x:0:0:root:/root:/bin/bash\n"
        "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
        "user:x:1000:1000::/home/user:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    GROUP = "root:x:0:\ndaemon:x:1:\nstaff:x:50:user\nuser:x:1000:\nnogroup:x:65534:\n"

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="accounts-", dir="/tmp"))
        self.folder.chmod(0o755)
        (self.folder / "passwd").write_text(self.PASSWD)
        (self.folder / "group").write_text(self.GROUP)
        (self.folder / "home/user").mkdir(parents=True)
        os.chown(self.folder / "home/user", 1000, 1000)

    @property
    def wrapper(self) -> list[str]:
        mounts = " && ".join(
            f"mount --bind {self.folder}/{source} {target}"
            for source, target in (("passwd", "/etc/passwd"), ("group", "/etc/group"), ("home", "/home"))
        )
        # The commands' PATH is the agent's; one of the machine's may lead into folders that `user` may not enter.
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        # Whoever runs the suite may run it as root: no test may set the machine's clock.
        enter = ["setpriv", "--bounding-set=-sys_time", "unshare", "--mount", "--propagation", "private"]
        return [*enter, "sh", "-c", f'{mounts} && exec env {path} "$@"', "sh"]

    def require(self) -> None:
        tried = subprocess.run([*self.wrapper, "true"], capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"the agent was not tested alone: no mount namespace can be made here ({tried.stderr.strip()})")

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Answer:
    """What a unary call answered, whichever codec it was made with."""

    status: int
    headers: httpx.Headers
    message: dict
    raw: bytes

    @property
    def error(self) -> tuple[int, str, str]:
        """Status, code and text of a refusal."""
        assert self.status != 200, f"it succeeded: {self.message}"
        return self.status, self.message.get("code"), self.message.get("message", "")

    def ok(self) -> dict:
        assert self.status == 200, f"{self.status}: {self.raw[:500]!r}"
        return self.message


def basic(user: str) -> dict:
    """The header that names a user."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()}


def b64(data: bytes | str) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


@dataclass
class Plane:
    """One agent and how it is reached."""

    name: str
    url: str
    headers: dict = field(default_factory=dict)
    sandbox_id: str | None = None
    hostd: Hostd | None = None
    guestd: Guestd | None = None

    @cached_property
    def http(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=30, trust_env=False, limits=limits)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname, parts.port

    # --- Connect ---

    def call(
        self, method: str, message: dict | None = None, *, codec: str = "json", headers: dict | None = None, user=None
    ) -> Answer:
        """A unary call; `codec` is json or proto, and the reply reads the same for both."""
        sent = {**(basic(user) if user else {}), **(headers or {})}
        if codec == "json":
            answer = self.http.post(f"/{method}", json=message or {}, headers=sent)
        else:
            body = proto.request(method, message or {})
            answer = self.http.post(f"/{method}", content=body, headers={"Content-Type": "application/proto", **sent})
        told = answer.content
        if answer.headers.get("content-type", "").startswith("application/proto"):
            read = proto.reply(method, told)
        else:
            try:
                read = answer.json()
            except ValueError:
                read = {}
        return Answer(answer.status_code, answer.headers, read, told)

    def process(self, method: str, message: dict | None = None, **options) -> Answer:
        return self.call(f"process.Process/{method}", message, **options)

    def fs(self, method: str, _codec: str = "json", _user: str | None = None, _headers: dict | None = None, **message) -> Answer:
        return self.call(f"filesystem.Filesystem/{method}", message, codec=_codec, user=_user, headers=_headers)

    def stream(self, method: str, message: dict, *, codec: str = "json", headers: dict | None = None, user=None) -> Ran:
        """A server stream of the process service, to its end."""
        sent = {**(basic(user) if user else {}), **(headers or {})}
        if codec == "json":
            with open_stream(self.http, f"process.Process/{method}", message, sent) as response:
                assert response.status_code == 200, f"{response.status_code}: {response.read()!r}"
                return Stream(response).rest()
        body = envelope(proto.request(f"process.Process/{method}", message))
        answer = self.http.post(f"/process.Process/{method}", content=body, headers={"Content-Type": PROTO_STREAM, **sent})
        assert answer.status_code == 200, f"{answer.status_code}: {answer.content!r}"
        return read_proto(f"process.Process/{method}", answer.content)

    def start(self, *argv: str, codec="json", headers=None, user=None, pty=None, tag=None, stdin=False, **config) -> Ran:
        """Runs a command to its end; `stdin=None` leaves the field out."""
        message = {"process": process(*argv, **config), "pty": pty, "tag": tag, "stdin": stdin}
        message = {name: value for name, value in message.items() if value is not None}
        return self.stream("Start", message, codec=codec, headers=headers, user=user)

    def begin(self, *argv: str, headers=None, user=None, pty=None, tag=None, stdin=None, **config):
        """A context manager: a Start stream of which nothing has been read; wrap it in `Stream`."""
        message = {"process": process(*argv, **config), "pty": pty, "tag": tag, "stdin": stdin}
        message = {name: value for name, value in message.items() if value is not None}
        return open_stream(self.http, "process.Process/Start", message, {**(basic(user) if user else {}), **(headers or {})})

    def join(self, headers: dict | None = None, **selector):
        """A context manager: a Connect stream of which nothing has been read."""
        return open_stream(self.http, "process.Process/Connect", {"process": selector}, headers)

    def signal(self, pid: int, name: str = "SIGNAL_SIGKILL") -> Answer:
        return self.process("SendSignal", {"process": {"pid": pid}, "signal": name})

    def listed(self) -> list[dict]:
        return self.process("List").ok().get("processes", [])

    # --- the machine behind it ---

    def sh(self, script: str, user: str = "root") -> str:
        """What a script prints that must succeed, run by the agent itself."""
        ran = self.start("/bin/bash", "-c", script, user=user, cwd="/")
        assert ran.end is not None and ran.exit_code == 0, f"{script}: {ran.end or ran.error}\n{ran.stdout!r}\n{ran.stderr!r}"
        return ran.stdout.decode()

    def alive(self, pid: int) -> bool:
        state = self.sh(f"cut -d')' -f2- /proc/{pid}/stat 2>/dev/null | cut -c2; true").strip()
        return state not in ("", "Z", "X")

    def folder(self) -> str:
        """A new empty folder of `user`, below its home."""
        path = f"{HOME}/{uuid.uuid4().hex[:12]}"
        self.sh(f"install -d -o user -g user {path}")
        return path

    def put(self, path: str, content: bytes | str = b"", owner: str = "user", mode: str = "644") -> str:
        """A file that is there before the case begins, without using what the case is about."""
        quoted = shlex.quote(path)
        data = b64(content)
        self.sh(f"printf %s {data} | base64 -d > {quoted} && chown {owner}: {quoted} && chmod {mode} {quoted}")
        return path

    def content(self, path: str) -> bytes:
        return base64.b64decode(self.sh(f"base64 -w0 {shlex.quote(path)}"))

    # --- the SDKs ---

    @property
    def sdk_options(self) -> dict:
        if self.hostd:
            return self.hostd.sdk()
        return {"debug": True, "sandbox_url": self.url, "api_key": API_KEY}

    @property
    def environment(self) -> dict:
        """The environment of a program that uses an SDK; `SANDBOX_ID` is set when there is one to connect to."""
        if self.hostd:
            return {**self.hostd.environment(), "SANDBOX_ID": self.sandbox_id}
        return {"E2B_DEBUG": "true", "E2B_SANDBOX_URL": self.url, "E2B_API_KEY": API_KEY}

    def close(self) -> None:
        self.http.close()


def read_proto(method: str, body: bytes) -> Ran:
    ran = Ran()
    for flags, payload in frames([body]):
        if flags & END:
            ran.error = json.loads(payload).get("error")
            ran.order.append("end frame")
        else:
            ran.take(proto.reply(method, payload)["event"])
    return ran


def stream_input(plane: Plane, *messages: dict, codec: str = "json", raw: bytes = b"") -> httpx.Response:
    """Sends the messages of a StreamInput at once, and bytes that are none after them."""
    method = "process.Process/StreamInput"
    if codec == "json":
        body, kind = b"".join(envelope(message) for message in messages), JSON_STREAM
    else:
        body, kind = b"".join(envelope(proto.request(method, message)) for message in messages), PROTO_STREAM
    return plane.http.post(f"/{method}", content=body + raw, headers={"Content-Type": kind})


def end_frame(answer: httpx.Response) -> dict:
    """The end frame of a whole stream, and how many messages came before it."""
    assert answer.status_code == 200, f"{answer.status_code}: {answer.content!r}"
    *messages, (flags, payload) = frames([answer.content])
    assert flags == END
    return {"messages": len(messages), **json.loads(payload)}


def alone(accounts: Accounts) -> tuple[Guestd, Plane]:
    """guestd by itself, ready for SDKs in debug mode: initialised with `user` as its default user and without a token."""
    agent = Guestd(wrapper=accounts.wrapper).start()
    answer = httpx.post(f"{agent.url}/init", json={"defaultUser": "user"}, trust_env=False)
    assert answer.status_code == 204, answer.text
    return agent, Plane("alone", agent.url, guestd=agent)


def in_a_machine(hostd: Hostd) -> Plane:
    created = hostd.create(timeout=3600)
    headers = {
        "E2b-Sandbox-Id": created["sandboxID"],
        "E2b-Sandbox-Port": "49983",
        "X-Access-Token": created["envdAccessToken"],
    }
    return Plane("microvm", hostd.proxy_url, headers=headers, sandbox_id=created["sandboxID"], hostd=hostd)
