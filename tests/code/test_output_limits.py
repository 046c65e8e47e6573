"""Much output, output that is no text, and clients that read slowly (row 33 of section 11: the reference's lock waits for the client)."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from harness.processes import wait_until

MEGABYTE = 1_000_000


@contextmanager
def stalled(interpreter, code: str, context_id: str, path: str = "/execute"):
    """A client that has asked and reads nothing; gives a function that reads all that is left, as lines."""
    body = json.dumps({"code": code, "context_id": context_id}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", interpreter.code_port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)

        def read() -> list[dict]:
            data = bytearray()
            while piece := raw.recv(1 << 20):
                data += piece
            head, _, body = bytes(data).partition(b"\r\n\r\n")
            assert b"chunked" in head.lower()
            content = bytearray()
            at = 0
            while True:
                end = body.index(b"\r\n", at)
                size = int(body[at:end], 16)
                if size == 0:
                    break
                content += body[end + 2 : end + 2 + size]
                at = end + 4 + size
            return [json.loads(line) for line in content.split(b"\n") if line]

        yield read


def said(events: list[dict]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "stdout")


@pytest.mark.takes(3)
def test_ten_megabytes_in_one_print_arrive_whole(door, python):
    cell = door.run("print('x' * 10_000_000)", context_id=python)
    assert cell.stdout == "x" * 10 * MEGABYTE + "\n"


@pytest.mark.takes(3)
def test_ten_megabytes_in_many_prints_arrive_whole_and_in_order(door, python):
    cell = door.run("for n in range(100_000):\n    print(f'{n:099}')", context_id=python)
    lines = cell.stdout.splitlines()
    assert len(lines) == 100_000 and all(int(line) == n for n, line in enumerate(lines))


@pytest.mark.takes(50)
def test_the_agents_memory_is_flat_under_a_hundred_megabytes(fresh):
    agent = fresh()
    code = "for n in range(10_000):\n    print('y' * 999)"
    assert len(agent.door.run(code).stdout) == 10 * MEGABYTE
    before = agent.memory()
    peak = 0
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, agent.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(10):
            assert len(agent.door.run(code).stdout) == 10 * MEGABYTE
    finally:
        done.set()
        watcher.join()
    assert peak - before < 48 * MEGABYTE, f"{before} -> {peak}"
    # On a busy machine the agent's queues fill; what they took goes back when it has been idle for half a minute.
    wait_until(lambda: agent.memory() - before < 4 * MEGABYTE, within=50, what=f"{before} bytes again")


@pytest.mark.takes(10)
def test_a_client_that_does_not_read_does_not_hold_the_context_and_loses_nothing(interpreter, python):
    door = interpreter.door
    with stalled(interpreter, "for n in range(8000):\n    print(f'{n:0999}')\n'end'", python) as read:
        time.sleep(3)
        began = time.monotonic()
        assert door.run("1 + 1", context_id=python).text == "2"
        assert time.monotonic() - began < 5, "the next cell waited for a client that does not read"
        time.sleep(2)
        events = read()
    lines = said(events).splitlines()
    assert len(lines) == 8000 and all(int(line) == n for n, line in enumerate(lines))
    assert [event["type"] for event in events][-2:] == ["result", "end_of_execution"]


@pytest.mark.takes(15)
def test_a_client_that_never_reads_does_not_fill_the_memory(fresh):
    agent = fresh()
    door = agent.door
    context = door.create()["id"]
    before = agent.memory()
    with stalled(agent, "for n in range(300_000):\n    print('z' * 999)", context):
        peak = 0
        for _ in range(60):
            time.sleep(0.2)
            peak = max(peak, agent.memory())
        assert peak - before < 150 * MEGABYTE, f"{before} -> {peak}"
        assert door.run("1 + 1").text == "2", "another context is not held up"
    wait_until(lambda: door.execute("1 + 1", context_id=context).text == "2", within=60, what="the context is free")
    assert agent.memory() - before < 150 * MEGABYTE


@pytest.mark.takes(4)
def test_a_slow_reader_gets_everything(interpreter, python):
    with interpreter.door.begin("for n in range(3000):\n    print(f'{n:0999}')", context_id=python) as running:
        for number, _ in enumerate(running):
            if number % 10 == 0:
                time.sleep(0.005)
    lines = running.cell.ok().stdout.splitlines()
    assert len(lines) == 3000 and all(int(line) == n for n, line in enumerate(lines))


@pytest.mark.parametrize(
    "code",
    [
        "print('a\\udc80b')",
        "print('a\\ud800b')",
        "import os\nos.write(1, b'a\\xff\\xfe\\x80b\\n'); import time; time.sleep(0.5)",
        "import sys\nsys.stdout.buffer.write(b'a\\xffb\\n') if hasattr(sys.stdout, 'buffer') else print('a?b')",
        "display({'text/plain': 'a\\udcffb'}, raw=True); print('a b')",
        "raise ValueError('a\\udc80b')",
    ],
    ids=["low-surrogate", "high-surrogate", "bytes", "buffer", "result", "error"],
)
def test_output_that_is_no_text_ends_neither_the_cell_nor_the_agent(door, interpreter, python, code):
    began = time.monotonic()
    cell = door.execute(code, context_id=python)
    assert time.monotonic() - began < 10
    shown = cell.stdout + cell.stderr + (cell.error["value"] + cell.error["name"] if cell.error else "")
    assert "a" in shown, str(cell)
    assert interpreter.process.poll() is None
    assert door.run("1 + 1", context_id=python).text == "2"


def test_a_character_that_is_cut_between_two_writes_breaks_no_cell(door, python):
    """The kernel decodes what it reads of its own descriptor, piece by piece; which pieces is luck."""
    code = "import os, time\ndata = 'grüße 🎉'.encode()\nfor byte in data:\n    os.write(1, bytes([byte]))\ntime.sleep(0.7)\nprint('after')"
    cell = door.run(code, context_id=python)
    assert cell.stdout.startswith("gr") and "e " in cell.stdout and cell.stdout.endswith("after\n"), cell.stdout


@pytest.mark.takes(4)
def test_code_of_five_megabytes_is_run(door, python):
    assert door.run(f"long = '{'a' * 5 * MEGABYTE}'\nlen(long)", context_id=python).text == str(5 * MEGABYTE)


def test_a_line_of_result_of_a_megabyte_is_one_line(door, python):
    assert len(door.run("'r' * 1_000_000", context_id=python).text) == MEGABYTE


@pytest.mark.takes(4)
def test_a_traceback_of_a_deep_recursion_is_an_error_and_no_hang(door, python):
    error = door.execute("def deep(n):\n    return deep(n + 1)\ndeep(0)", context_id=python).failed()
    assert error["name"] == "RecursionError"


@pytest.mark.takes(8)
def test_a_flood_of_displays_is_whole(door, python):
    """A kernel throws messages away when whoever listens is slow: PUB sockets do."""
    cell = door.run(
        "for n in range(5000):\n    display({'text/plain': str(n), 'text/html': 'h' * 2000}, raw=True)", context_id=python
    )
    assert [result["text"] for result in cell.results] == [str(n) for n in range(5000)]


def test_strange_characters_do_not_use_up_what_all_cells_may_keep(fresh):
    """They are escaped, so their lines are longer than the kernel's were."""
    door = fresh().door
    for _ in range(5):
        assert door.run("print('\\x85\\u2028' * 1000, end='')").stdout == "\x85\u2028" * 1000
    assert door.run("1 + 1").text == "2"
