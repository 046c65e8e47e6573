"""The Connect protocol as bytes: envelopes, end frames and the few protobuf messages that the tests write by hand."""

import base64
import json
import struct
from dataclasses import dataclass, field

import httpx

COMPRESSED = 0x01
END = 0x02
JSON_STREAM = "application/connect+json"
PROTO_STREAM = "application/connect+proto"


def envelope(message: dict | bytes, flags: int = 0) -> bytes:
    payload = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">BI", flags, len(payload)) + payload


def frames(body):
    """(flags, payload) of each message in an iterable of byte strings."""
    buffered = bytearray()
    for piece in body:
        buffered += piece
        while len(buffered) >= 5:
            flags, length = struct.unpack(">BI", buffered[:5])
            if len(buffered) < 5 + length:
                break
            yield flags, bytes(buffered[5 : 5 + length])
            del buffered[: 5 + length]
    assert not buffered, f"the stream ended inside a frame: {bytes(buffered[:80])!r}"


def call(client: httpx.Client, method: str, message: dict | None = None, **options) -> httpx.Response:
    """A unary call with JSON, e.g. `call(client, "process.Process/List")`."""
    return client.post(f"/{method}", json=message or {}, **options)


def process(*argv: str, **config) -> dict:
    """The ProcessConfig of a command line."""
    return {"cmd": argv[0], "args": list(argv[1:]), **config}


@dataclass
class Ran:
    """What one Start or Connect stream told, from its first event to its end frame."""

    pid: int | None = None
    # What came on each channel; grown in place, for outputs of megabytes.
    out: dict[str, bytearray] = field(
        default_factory=lambda: {name: bytearray() for name in ("stdout", "stderr", "pty")}, repr=False
    )
    keepalives: int = 0
    gaps: list[dict] = field(default_factory=list)
    # Where each data event begins in the process's output, for who asked for offsets.
    offsets: list[int] = field(default_factory=list)
    end: dict | None = None
    error: dict | None = None
    order: list[str] = field(default_factory=list)

    @property
    def stdout(self) -> bytes:
        return bytes(self.out["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self.out["stderr"])

    @property
    def pty(self) -> bytes:
        return bytes(self.out["pty"])

    @property
    def received(self) -> int:
        """Bytes on all channels."""
        return sum(map(len, self.out.values()))

    @property
    def exit_code(self) -> int:
        assert self.end is not None, f"no end event: {self}"
        return self.end.get("exitCode", 0)

    def __str__(self) -> str:
        shown = {name: bytes(out[:200]) for name, out in self.out.items() if out}
        return f"pid {self.pid}, {' '.join(self.order[-20:])}, end {self.end}, error {self.error}, {shown}"

    def take(self, event: dict) -> None:
        kind, value = next(iter(event.items()))
        self.order.append(kind)
        if kind == "start":
            self.pid = value["pid"]
        elif kind == "data":
            for channel, out in self.out.items():
                out += base64.b64decode(value.get(channel, ""))
            if "offset" in value:
                self.offsets.append(int(value["offset"]))
        elif kind == "keepalive":
            self.keepalives += 1
        elif kind == "gap":
            self.gaps.append(value)
        else:
            assert kind == "end", f"an event of no known kind: {event}"
            self.end = value


class Stream:
    """A server stream that is read message by message."""

    def __init__(self, response: httpx.Response):
        self.response = response
        self.frames = frames(response.iter_raw())
        self.ran = Ran()

    def __iter__(self):
        for flags, payload in self.frames:
            message = json.loads(payload)
            if flags & END:
                self.ran.error = message.get("error")
                self.ran.order.append("end frame")
                return
            self.ran.take(message["event"])
            yield message["event"]
        raise AssertionError(f"the stream ended without an end frame: {self.ran}")

    def until(self, kind: str) -> dict:
        for event in self:
            if kind in event:
                return event[kind]
        raise AssertionError(f"no {kind} event: {self.ran}")

    def rest(self) -> Ran:
        for _ in self:
            pass
        return self.ran


def open_stream(client: httpx.Client, method: str, message: dict, headers: dict | None = None):
    """A context manager: the response of a server stream."""
    return client.stream(
        "POST", f"/{method}", content=envelope(message), headers={"Content-Type": JSON_STREAM, **(headers or {})}
    )


def start(client: httpx.Client, *argv: str, headers: dict | None = None, **request) -> Ran:
    """Runs a command to its end."""
    config = {key: request.pop(key) for key in ("envs", "cwd") if key in request}
    message = {"process": process(*argv, **config), **request}
    with open_stream(client, "process.Process/Start", message, headers) as response:
        assert response.status_code == 200, f"{response.status_code}: {response.read().decode()}"
        return Stream(response).rest()


def connect(client: httpx.Client, headers: dict | None = None, **selector) -> Ran:
    """Joins a process by `pid` or `tag`."""
    with open_stream(client, "process.Process/Connect", {"process": selector}, headers) as response:
        assert response.status_code == 200, f"{response.status_code}: {response.read().decode()}"
        return Stream(response).rest()


# --- protobuf, as much as is needed to speak the binary codec without generated code ---


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def proto_field(number: int, value: bytes | str) -> bytes:
    """A length-delimited field: a string, bytes or a message."""
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def proto_fields(message: bytes) -> dict[int, list]:
    """The fields of a message by number; numbers stay numbers, everything else bytes."""
    found, at = {}, 0

    def take_varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while at < len(message):
        key = take_varint()
        kind = key & 7
        if kind == 0:
            value = take_varint()
        elif kind == 2:
            length = take_varint()
            value, at = message[at : at + length], at + length
        else:
            raise AssertionError(f"wire type {kind} is not used by these services")
        found.setdefault(key >> 3, []).append(value)
    return found
