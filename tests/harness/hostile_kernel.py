"""A kernel that misbehaves: `hostile_kernel.py MODE CONNECTION_FILE`. It speaks the Jupyter protocol by hand, over pyzmq alone."""

import hashlib
import hmac
import json
import os
import signal
import sys
import threading
import time
import uuid

MODES = (
    # It behaves: the other modes are worth something only beside it.
    "good",
    # Before it is ready.
    "exits-at-once",
    "never-binds",
    "silent",
    "wrong-key",
    "not-zmtp",
    "closes-after-start",
    # In a cell.
    "no-idle",
    "no-reply",
    "neither",
    "foreign",
    "early-idle",
    "twice",
    "garbage",
    "bad-fields",
    "deep",
    "huge",
    "many-frames",
    "forged",
    "dies-after-idle",
    "hangs-up",
    "replies-then-dies",
    # Afterwards.
    "flood",
    "immortal",
    "liar",
)


class Kernel:
    def __init__(self, mode: str, connection: dict):
        import zmq

        self.mode = mode
        self.key = connection["key"].encode()
        self.session = uuid.uuid4().hex
        self.count = 0
        context = zmq.Context()

        def bind(kind: int, name: str):
            socket = context.socket(kind)
            socket.linger = 0
            if connection["transport"] == "ipc":
                socket.bind(f"ipc://{connection['ip']}-{connection[name + '_port']}")
            else:
                socket.bind(f"tcp://{connection['ip']}:{connection[name + '_port']}")
            return socket

        self.iopub = bind(zmq.PUB, "iopub")
        self.shell = bind(zmq.ROUTER, "shell")
        self.control = bind(zmq.ROUTER, "control")
        self.stdin = bind(zmq.ROUTER, "stdin")
        self.hb = bind(zmq.REP, "hb")
        self.poller = zmq.Poller()
        for socket in (self.shell, self.control, self.hb):
            self.poller.register(socket, zmq.POLLIN)

    # --- messages ---

    def frames(self, kind: str, content, parent: dict, identities=(), key: bytes | None = None) -> list[bytes]:
        header = {
            "msg_id": uuid.uuid4().hex,
            "session": self.session,
            "username": "kernel",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime()),
            "msg_type": kind,
            "version": "5.3",
        }
        parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, parent, {}, content)]
        signature = hmac.new(self.key if key is None else key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        return [*identities, b"<IDS|MSG>", signature, *parts]

    def publish(self, kind: str, content, parent: dict, **options) -> None:
        self.iopub.send_multipart(self.frames(kind, content, parent, identities=[kind.encode()], **options))

    def status(self, state: str, parent: dict) -> None:
        self.publish("status", {"execution_state": state}, parent)

    def reply(self, socket, identities, kind: str, content: dict, parent: dict, key: bytes | None = None) -> None:
        socket.send_multipart(self.frames(kind, content, parent, identities, key))

    # --- service ---

    def serve(self) -> None:
        while True:
            for socket, _ in self.poller.poll():
                frames = socket.recv_multipart()
                if socket is self.hb:
                    socket.send_multipart(frames)
                else:
                    self.take(socket, frames)

    def take(self, socket, frames: list[bytes]) -> None:
        if self.mode == "silent":
            return
        at = frames.index(b"<IDS|MSG>")
        identities, header = frames[:at], json.loads(frames[at + 2])
        content = json.loads(frames[at + 5])
        kind = header["msg_type"]
        key = b"not the key" if self.mode == "wrong-key" else None
        if kind == "kernel_info_request":
            self.status("busy", header)
            info = {
                "status": "ok",
                "protocol_version": "5.3",
                "implementation": "hostile",
                "implementation_version": "1",
                "language_info": {"name": "hostile", "version": "1", "mimetype": "text/plain", "file_extension": ".txt"},
                "banner": "",
                "help_links": [],
            }
            self.reply(socket, identities, "kernel_info_reply", info, header, key)
            self.status("idle", header)
        elif kind == "execute_request":
            self.execute(socket, identities, header, content)
        elif kind == "interrupt_request":
            self.reply(socket, identities, "interrupt_reply", {"status": "ok"}, header)
        elif kind == "shutdown_request" and self.mode != "immortal":
            self.reply(socket, identities, "shutdown_reply", {"status": "ok", "restart": False}, header)
            sys.exit(0)

    def execute(self, socket, identities, header: dict, content: dict) -> None:
        mode, code = self.mode, content.get("code", "")
        ours = {"status": "ok", "execution_count": self.count + 1, "user_expressions": {}, "payload": []}
        self.status("busy", header)
        if content.get("silent"):
            self.reply(socket, identities, "execute_reply", ours, header)
            self.status("idle", header)
            return
        self.count += 1
        self.publish("execute_input", {"code": code, "execution_count": self.count}, header)
        stranger = {**header, "msg_id": uuid.uuid4().hex, "session": "another"}
        if mode == "foreign":
            for parent in (stranger, {}, {"msg_id": 5}, {**header, "msg_id": header["msg_id"] + "x"}):
                self.publish("stream", {"name": "stdout", "text": "NOT YOURS"}, parent)
                self.publish("error", {"ename": "NotYours", "evalue": "", "traceback": []}, parent)
                self.status("idle", parent)
            self.reply(
                socket,
                identities,
                "execute_reply",
                {**ours, "status": "error", "ename": "NotYours", "evalue": "", "traceback": []},
                stranger,
            )
        elif mode == "forged":
            self.publish("stream", {"name": "stdout", "text": "FORGED"}, header, key=b"not the key")
            self.reply(
                socket,
                identities,
                "execute_reply",
                {**ours, "status": "error", "ename": "Forged", "evalue": "", "traceback": []},
                header,
                b"not the key",
            )
            frames = self.frames("stream", {"name": "stdout", "text": "UNSIGNED"}, header, [b"stream"])
            frames[2] = b""
            self.iopub.send_multipart(frames)
        elif mode == "garbage":
            for frames in (
                [b""],
                [b"<IDS|MSG>"],
                [b"stream", b"<IDS|MSG>", b"sig"],
                [b"\xff" * 300],
                [b"stream"] * 20,
                self.frames("stream", b"{not json", header, [b"x"]),
                self.frames("stream", b"\xff\xfe", header, [b"x"]),
                self.frames("stream", [], header, [b"x"]),
                self.frames("no_such_type", {}, header, [b"x"]),
                self.frames("stream", {}, header, [b"\xff" * 1000]),
            ):
                self.iopub.send_multipart(frames)
        elif mode == "bad-fields":
            for kind, content in (
                ("stream", {"name": 5, "text": 7}),
                ("stream", {"name": "stdnothing", "text": "nowhere"}),
                ("stream", None),
                ("execute_input", {"execution_count": "many"}),
                ("execute_result", {"data": ["a"], "execution_count": -1}),
                (
                    "execute_result",
                    {"data": {"text/plain": {"not": "text"}, "image/png": 5, "text/html": ["a", "b"]}, "metadata": None},
                ),
                ("display_data", {"data": None}),
                ("error", {"ename": 5, "evalue": None, "traceback": "a string"}),
                ("status", {"execution_state": 5}),
                ("status", {}),
            ):
                self.publish(kind, content, header)
        elif mode == "deep":
            nested = b'{"data": {"application/json": ' + b"[" * 200_000 + b"]" * 200_000 + b'}, "metadata": {}}'
            self.iopub.send_multipart(self.frames("display_data", nested, header, [b"display_data"]))
        elif mode == "huge":
            self.publish("stream", {"name": "stdout", "text": "h" * 300_000_000}, header)
        elif mode == "many-frames":
            self.iopub.send_multipart([b"stream", *[b"x"] * 20_000])
            self.iopub.send_multipart(
                self.frames("stream", {"name": "stdout", "text": "with buffers "}, header, [b"stream"]) + [b"y" * 1000] * 500
            )
        elif mode == "early-idle":
            self.status("idle", stranger)
            time.sleep(0.5)
        elif mode == "hangs-up":
            for each in (self.iopub, self.shell, self.control, self.stdin, self.hb):
                each.close()
            time.sleep(1000)
        self.publish("stream", {"name": "stdout", "text": f"said {code}"}, header)
        if mode == "liar":
            self.publish("execute_input", {"code": code, "execution_count": 10**30}, header)
        if mode == "replies-then-dies":
            self.reply(socket, identities, "execute_reply", ours, header)
            time.sleep(0.2)
            os._exit(7)
        for _ in range(3 if mode == "twice" else 1):
            if mode not in ("no-reply", "neither"):
                self.reply(socket, identities, "execute_reply", ours, header)
            if mode not in ("no-idle", "neither"):
                self.status("idle", header)
        if mode == "dies-after-idle":
            time.sleep(0.05)
            os._exit(7)
        if mode == "flood":
            threading.Thread(target=self.flood, args=(header,), daemon=True).start()

    def flood(self, header: dict) -> None:
        while True:
            self.publish("stream", {"name": "stdout", "text": "f" * 10_000}, header)
            time.sleep(0.0005)


def not_zmtp(connection: dict) -> None:
    """Listeners that answer with bytes of no protocol."""
    import socket

    def babble(listener) -> None:
        while True:
            peer, _ = listener.accept()
            try:
                peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + os.urandom(4096))
            except OSError:
                pass

    for name in ("iopub", "shell", "control", "stdin", "hb"):
        port = connection[name + "_port"]
        if connection["transport"] == "ipc":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{connection['ip']}-{port}")
        else:
            listener = socket.socket()
            listener.bind((connection["ip"], port))
        listener.listen()
        threading.Thread(target=babble, args=(listener,), daemon=True).start()


def main() -> None:
    mode, file = sys.argv[1:3]
    connection = json.load(open(file))
    if mode == "exits-at-once":
        print("the last words of a hostile kernel", file=sys.stderr, flush=True)
        os._exit(7)
    if mode == "immortal":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if mode == "never-binds":
        time.sleep(1000)
    if mode == "not-zmtp":
        not_zmtp(connection)
        time.sleep(1000)
    kernel = Kernel(mode, connection)
    if mode == "closes-after-start":
        time.sleep(0.3)
        for each in (kernel.iopub, kernel.shell, kernel.control, kernel.stdin, kernel.hb):
            each.close()
        time.sleep(1000)
    kernel.serve()


if __name__ == "__main__":
    main()
