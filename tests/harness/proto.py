"""The messages of both services in protobuf's binary form, to and from the dictionaries of its JSON form.

Written by hand from the field numbers of the contract (envd.md sections 1.2 and 1.3), so that a wrong number in the product's own
`.proto` files is found. It reads strictly: a field that the contract does not have is an error, unless its number is 100 or more
(those are this project's additions and are left out).
"""

import base64
from datetime import datetime, timezone

from harness.connect import proto_field, proto_fields, varint

FILE_TYPE = ["FILE_TYPE_UNSPECIFIED", "FILE_TYPE_FILE", "FILE_TYPE_DIRECTORY", "FILE_TYPE_SYMLINK"]
EVENT_TYPE = [f"EVENT_TYPE_{name}" for name in ("UNSPECIFIED", "CREATE", "WRITE", "REMOVE", "RENAME", "CHMOD")]
SIGNAL = {0: "SIGNAL_UNSPECIFIED", 15: "SIGNAL_SIGTERM", 9: "SIGNAL_SIGKILL"}

# Fields by JSON name: number and kind. A kind in a list is repeated; `?` marks a field whose presence is told apart from its default.
PTY = {"size": (1, {"cols": (1, "uint"), "rows": (2, "uint")})}
CONFIG = {"cmd": (1, "string"), "args": (2, ["string"]), "envs": (3, "map"), "cwd": (4, "string?")}
SELECTOR = {"pid": (1, "uint?"), "tag": (2, "string?")}
INPUT = {"stdin": (1, "bytes?"), "pty": (2, "bytes?")}
EVENT = {
    "event": (
        1,
        {
            "start": (1, {"pid": (1, "uint")}),
            "data": (2, {"stdout": (1, "bytes?"), "stderr": (2, "bytes?"), "pty": (3, "bytes?")}),
            "end": (3, {"exitCode": (1, "sint"), "exited": (2, "bool"), "status": (3, "string"), "error": (4, "string?")}),
            "keepalive": (4, {}),
        },
    )
}
ENTRY = {
    "name": (1, "string"),
    "type": (2, FILE_TYPE),
    "path": (3, "string"),
    "size": (4, "int64"),
    "mode": (5, "uint"),
    "permissions": (6, "string"),
    "owner": (7, "string"),
    "group": (8, "string"),
    "modifiedTime": (9, "time"),
    "symlinkTarget": (10, "string?"),
    "metadata": (11, "map"),
    "isSymlink": (12, "bool"),
}
WATCH = {"path": (1, "string"), "recursive": (2, "bool"), "includeEntry": (3, "bool"), "allowNetworkMounts": (4, "bool")}
CHANGE = {"name": (1, "string"), "type": (2, EVENT_TYPE), "entry": (3, ENTRY)}
BY_SELECTOR = {"process": (1, SELECTOR)}
ENTRY_REPLY = {"entry": (1, ENTRY)}
PATH = {"path": (1, "string")}

# Request and reply of each method.
METHODS = {
    "process.Process/List": ({}, {"processes": (1, [{"config": (1, CONFIG), "pid": (2, "uint"), "tag": (3, "string?")}])}),
    "process.Process/Start": ({"process": (1, CONFIG), "pty": (2, PTY), "tag": (3, "string?"), "stdin": (4, "bool?")}, EVENT),
    "process.Process/Connect": (BY_SELECTOR, EVENT),
    "process.Process/Update": ({**BY_SELECTOR, "pty": (2, PTY)}, {}),
    "process.Process/StreamInput": (
        {"start": (1, BY_SELECTOR), "data": (2, {"input": (2, INPUT)}), "keepalive": (3, {})},
        {},
    ),
    "process.Process/SendInput": ({**BY_SELECTOR, "input": (2, INPUT)}, {}),
    "process.Process/SendSignal": ({**BY_SELECTOR, "signal": (2, SIGNAL)}, {}),
    "process.Process/CloseStdin": (BY_SELECTOR, {}),
    "filesystem.Filesystem/Stat": (PATH, ENTRY_REPLY),
    "filesystem.Filesystem/MakeDir": (PATH, ENTRY_REPLY),
    "filesystem.Filesystem/Move": ({"source": (1, "string"), "destination": (2, "string")}, ENTRY_REPLY),
    "filesystem.Filesystem/ListDir": ({**PATH, "depth": (2, "uint")}, {"entries": (1, [ENTRY])}),
    "filesystem.Filesystem/Remove": (PATH, {}),
    "filesystem.Filesystem/WatchDir": (WATCH, {"start": (1, {}), "filesystem": (2, CHANGE), "keepalive": (3, {})}),
    "filesystem.Filesystem/CreateWatcher": (WATCH, {"watcherId": (1, "string")}),
    "filesystem.Filesystem/GetWatcherEvents": ({"watcherId": (1, "string")}, {"events": (1, [CHANGE])}),
    "filesystem.Filesystem/RemoveWatcher": ({"watcherId": (1, "string")}, {}),
}

_ADDITIONS = 100


def request(method: str, message: dict) -> bytes:
    return encode(METHODS[method][0], message)


def reply(method: str, payload: bytes) -> dict:
    return decode(METHODS[method][1], payload)


def encode(schema: dict, message: dict) -> bytes:
    out = b""
    for name, value in message.items():
        number, kind = schema[name]
        repeated = isinstance(kind, list) and kind not in (FILE_TYPE, EVENT_TYPE)
        for each in value if repeated else [value]:
            out += _encode_one(number, kind[0] if repeated else kind, each)
    return out


def _encode_one(number: int, kind, value) -> bytes:
    if isinstance(kind, dict) and kind is not SIGNAL:
        return proto_field(number, encode(kind, value))
    if kind == "map":
        return b"".join(proto_field(number, proto_field(1, key) + proto_field(2, each)) for key, each in value.items())
    if kind is SIGNAL:
        return varint(number << 3) + varint(next(n for n, name in SIGNAL.items() if value in (n, name)))
    if kind.startswith("string"):
        return proto_field(number, value)
    if kind.startswith("bytes"):
        return proto_field(number, base64.b64decode(value))
    return varint(number << 3) + varint(int(value))


def decode(schema: dict, payload: bytes) -> dict:
    names = {number: (name, kind) for name, (number, kind) in schema.items()}
    message = {}
    for number, values in proto_fields(payload).items():
        if number not in names:
            assert number >= _ADDITIONS, f"field {number} is not in the contract: {schema}"
            continue
        name, kind = names[number]
        if kind == "map":
            pairs = (proto_fields(value) for value in values)
            message[name] = {pair.get(1, [b""])[0].decode(): pair.get(2, [b""])[0].decode() for pair in pairs}
        elif isinstance(kind, list) and kind not in (FILE_TYPE, EVENT_TYPE):
            message[name] = [_decode_one(kind[0], value) for value in values]
        else:
            assert len(values) == 1, f"{name} was sent {len(values)} times"
            message[name] = _decode_one(kind, values[0])
    return message


def _decode_one(kind, value):
    if isinstance(kind, dict):
        return decode(kind, value)
    if isinstance(kind, list):
        return kind[value]
    if kind.startswith("string"):
        return value.decode()
    if kind.startswith("bytes"):
        return base64.b64encode(value).decode()
    if kind == "sint":
        return (value >> 1) ^ -(value & 1)
    if kind == "int64":
        return str(value)
    if kind.startswith("bool"):
        return bool(value)
    if kind == "time":
        parts = proto_fields(value)
        whole = datetime.fromtimestamp(parts.get(1, [0])[0], timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        nanos = parts.get(2, [0])[0]
        return f"{whole}.{nanos:09}Z" if nanos else f"{whole}Z"
    return value
