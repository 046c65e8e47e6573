"""The floor of the code cells: a kernel asked without anything between, over ZeroMQ.

Usage: bare_kernel.py FOLDER [first]. Starts an ipykernel whose sockets are in FOLDER. With `first` it prints the seconds from the start
to the result of its first cell and ends; else, for each line on stdin, the seconds that one `1+1` takes.
"""

import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
import uuid

import zmq

folder = sys.argv[1]
key = uuid.uuid4().hex
connection = {
    "transport": "ipc",
    "ip": os.path.join(folder, "k"),
    "key": key,
    "signature_scheme": "hmac-sha256",
    "kernel_name": "python3",
    "shell_port": 1,
    "iopub_port": 2,
    "stdin_port": 3,
    "control_port": 4,
    "hb_port": 5,
}
path = os.path.join(folder, "connection.json")
with open(path, "w") as file:
    json.dump(connection, file)

begun = time.perf_counter()
kernel = subprocess.Popen(
    [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", path],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
context = zmq.Context()
shell = context.socket(zmq.DEALER)
iopub = context.socket(zmq.SUB)
iopub.subscribe(b"")
shell.connect(f"ipc://{connection['ip']}-1")
iopub.connect(f"ipc://{connection['ip']}-2")
poller = zmq.Poller()
poller.register(shell, zmq.POLLIN)
poller.register(iopub, zmq.POLLIN)


def ask(kind: str, content: dict, limit: float) -> bool:
    """Whether the reply and the idle state came in time."""
    identity = uuid.uuid4().hex
    header = json.dumps({"msg_id": identity, "session": key, "username": "", "date": "1970-01-01T00:00:00Z", "msg_type": kind, "version": "5.3"})
    parts = [part.encode() for part in (header, "{}", "{}", json.dumps(content))]
    signature = hmac.new(key.encode(), b"".join(parts), hashlib.sha256).hexdigest().encode()
    shell.send_multipart([b"<IDS|MSG>", signature, *parts])
    until = time.perf_counter() + limit
    replied = idle = False
    while not (replied and idle):
        left = until - time.perf_counter()
        if left <= 0:
            return False
        for socket, _ in poller.poll(left * 1000):
            frames = socket.recv_multipart()
            body = frames[frames.index(b"<IDS|MSG>") + 2 :]
            if json.loads(body[1]).get("msg_id") != identity:
                continue
            if socket is shell:
                replied = True
            elif json.loads(body[0])["msg_type"] == "status":
                idle = json.loads(body[3])["execution_state"] == "idle"
    return True


def cell() -> None:
    content = {"code": "1+1", "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    assert ask("execute_request", content, 60), "the kernel does not answer"


try:
    while not ask("kernel_info_request", {}, 0.25):
        assert kernel.poll() is None, "the kernel ended"
    if sys.argv[2:] == ["first"]:
        cell()
        print(time.perf_counter() - begun, flush=True)
    else:
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            cell()
            print(time.perf_counter() - start, flush=True)
finally:
    kernel.send_signal(signal.SIGKILL)
    kernel.wait()
