"""What only time or numbers show. Not in the default run: `pytest tests/soak -m soak -n 0`, with SOAK_SECONDS for how long a flood lasts (600)."""

import asyncio
import base64
import json
import os
import re
import resource
import socket
import time
from pathlib import Path

import httpx
import pytest

from harness.connect import END, JSON_STREAM, Stream, envelope, frames, process, start

pytestmark = pytest.mark.soak
SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
MIB = 1 << 20


def rss(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def tasks(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def groups() -> int:
    """Control groups of the whole machine, which a quiet machine neither makes nor removes."""
    roots = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[2] == "cgroup2"]
    return sum(1 for root in roots for _ in os.walk(root))


class Stalled:
    """A reader that asks for everything and takes nothing; again each time that it is cut off."""

    def __init__(self, port: int, pid: int):
        self.port, self.pid, self.opened = port, pid, 0
        self.connection = None
        self.again()

    def again(self):
        if self.connection:
            self.connection.close()
        self.connection = socket.socket()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.connection.connect(("127.0.0.1", self.port))
        body = envelope({"process": {"pid": self.pid}})
        head = f"POST /process.Process/Connect HTTP/1.1\r\nHost: a\r\nContent-Type: {JSON_STREAM}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.sendall(head.encode() + body)
        self.opened += 1


@pytest.mark.timeout(SECONDS + 300)
def test_a_flood_beside_a_stalled_reader_loses_nothing_and_keeps_memory_flat(guestd, agent):
    """The live reader gets every line of a numbered stream; each second the agent's memory is looked at."""
    width = 13
    sizes, seen, following, started = [], 0, b"", time.monotonic()
    with agent.stream(
        "POST",
        "/process.Process/Start",
        content=envelope({"process": process("/usr/bin/seq", "-f", "%012.0f", "0", "999999999999")}),
        headers={"Content-Type": JSON_STREAM},
    ) as response:
        stalled, looked, pid = None, started, None
        for flags, payload in frames(response.iter_raw()):
            assert not flags & END, payload
            event = json.loads(payload)["event"]
            if "start" in event:
                pid = event["start"]["pid"]
                stalled = Stalled(guestd.port, pid)
                continue
            text = following + base64.b64decode(event.get("data", {}).get("stdout", ""))
            lines = len(text) // width
            expected = b"".join(b"%012d\n" % n for n in range(seen, seen + lines))
            assert text[: lines * width] == expected, f"lost or doubled near line {seen}"
            seen, following = seen + lines, text[lines * width :]
            now = time.monotonic()
            if now - looked >= 1:
                looked = now
                sizes.append(rss(guestd.process.pid))
                if len(sizes) % 15 == 0:
                    stalled.again()
            if now - started >= SECONDS:
                break
        agent.post("/process.Process/SendSignal", json={"process": {"pid": pid}, "signal": 9})
    settled = sizes[min(10, len(sizes) // 3) :]
    spread = max(settled) - min(settled)
    print(
        f"\n{seen * width / MIB:.0f} MiB in {SECONDS:.0f} s beside {stalled.opened} stalled readers; {min(settled) / MIB:.1f} to {max(settled) / MIB:.1f} MiB"
    )
    assert spread <= 8 * MIB, f"memory moved by {spread / MIB:.1f} MiB"


@pytest.mark.timeout(300)
def test_a_thousand_commands_at_once_all_tell_their_exit(guestd):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.prlimit(guestd.process.pid, resource.RLIMIT_NOFILE, (hard, hard))

    async def one(client: httpx.AsyncClient, n: int) -> tuple[int, bytes]:
        body = envelope({"process": process("/bin/sh", "-c", f"sleep 1; echo {n}; exit {n % 256}"), "stdin": False})
        async with client.stream(
            "POST", "/process.Process/Start", content=body, headers={"Content-Type": JSON_STREAM}
        ) as response:
            content = b"".join([piece async for piece in response.aiter_raw()])
        *events, (flags, last) = frames([content])
        assert flags == END and json.loads(last) == {}, last
        events = [json.loads(payload)["event"] for _, payload in events]
        out = b"".join(base64.b64decode(event["data"].get("stdout", "")) for event in events if "data" in event)
        return events[-1]["end"].get("exitCode", 0), out

    async def all_of_them() -> list:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=guestd.url, timeout=240, limits=limits, trust_env=False) as client:
            return await asyncio.gather(*(one(client, n) for n in range(1000)))

    try:
        answers = asyncio.run(all_of_them())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert answers == [(n % 256, f"{n}\n".encode()) for n in range(1000)]


@pytest.mark.timeout(900)
def test_ten_thousand_commands_leave_nothing_behind(guestd, agent):
    pid = guestd.process.pid
    for _ in range(200):
        assert start(agent, "/bin/true", stdin=False).exit_code == 0
    before = (descriptors(pid), groups())

    def five_thousand() -> int:
        """The agent's memory when their ends, which are kept for 30 s, are forgotten."""
        began = time.monotonic()
        for n in range(5_000):
            assert start(agent, "/bin/sh", "-c", f"exit {n % 7}", stdin=n % 2 == 0).exit_code == n % 7
        print(f"\n{(time.monotonic() - began) / 5:.2f} ms each, {rss(pid) / MIB:.1f} MiB at the end", end="")
        time.sleep(33)
        print(f", {rss(pid) / MIB:.1f} MiB when forgotten")
        return rss(pid)

    first = five_thousand()
    second = five_thousand()
    assert second - first < 2 * MIB, "what one command leaves behind adds up"
    assert children(pid) == [], "no zombie and no child is left"
    assert descriptors(pid) <= before[0] + 2
    # The pool of blocking threads is bounded and ends its idle ones after 10 s.
    assert tasks(pid) <= 34
    assert groups() <= before[1] + 1
    assert agent.post("/process.Process/List", json={}).json() == {}


@pytest.mark.timeout(SECONDS + 120)
def test_readers_that_come_and_go_leave_nothing_behind(guestd, agent):
    pid = guestd.process.pid
    with agent.stream(
        "POST",
        "/process.Process/Start",
        content=envelope({"process": process("/bin/sh", "-c", "while :; do echo x; sleep 0.01; done")}),
        headers={"Content-Type": JSON_STREAM},
    ) as response:
        target = Stream(response).until("start")["pid"]
    before = (descriptors(pid), rss(pid))
    until = time.monotonic() + min(SECONDS, 60)
    count = 0
    while time.monotonic() < until:
        with agent.stream(
            "POST",
            "/process.Process/Connect",
            content=envelope({"process": {"pid": target}}),
            headers={"Content-Type": JSON_STREAM},
        ) as response:
            Stream(response).until("start")
        count += 1
    agent.post("/process.Process/SendSignal", json={"process": {"pid": target}, "signal": 9})
    time.sleep(1)
    print(f"\n{count} readers")
    assert descriptors(pid) <= before[0] + 2
    assert rss(pid) - before[1] < 8 * MIB
