"""Servers that listen on a loopback address only, reached at the machine's own address: two network namespaces, one cable."""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import locations
from harness.processes import wait_until

INSIDE, OUTSIDE = "169.254.0.21", "169.254.0.22"
INSIDE6, OUTSIDE6 = "fd00::21", "fd00::22"
PORT = 8000
# Not the usual one, which nobody else is expected on.
CODE_PORT = 5001

# Answers each connection with what it sent up to its end, after who it was.
SERVER = """
    import socket, sys
    def listen(address, port):
        server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, port))
        server.listen()
        return server
    def answer(server):
        connection, peer = server.accept()
        with connection:
            got = b""
            while piece := connection.recv(65536):
                got += piece
            connection.sendall(peer[0].encode() + b" " + got)
"""


class Wire:
    """A namespace with guestd in it and one with its clients."""

    def __init__(self):
        self.names = [f"gp{os.getpid()}{side}" for side in "ab"]
        self.inside, self.outside = self.names

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)

    def up(self) -> None:
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", "name", "wire0", "netns", self.inside, "type", "veth", "peer", "name", "wire1", "netns", self.outside)
        for name, device, *addresses in zip(self.names, ("wire0", "wire1"), (INSIDE, OUTSIDE), (INSIDE6, OUTSIDE6)):
            for address, length in zip(addresses, (24, 64)):
                # A new IPv6 address is otherwise tried out for a second.
                now = ["nodad"] if ":" in address else []
                self.ip("-n", name, "addr", "add", f"{address}/{length}", "dev", device, *now)
            for each in ("lo", device):
                self.ip("-n", name, "link", "set", each, "up")

    def down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)

    def popen(self, name: str, *command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(["ip", "netns", "exec", name, *command], **options)

    def python(self, name: str, script: str, *arguments: str) -> subprocess.Popen:
        script = textwrap.dedent(SERVER) + textwrap.dedent(script)
        command = [sys.executable, "-c", script, *arguments]
        return self.popen(name, *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, message: str, port: int = PORT, address: str = INSIDE) -> str | None:
        """What the server answers to a client outside; None when the connection was refused or reset."""
        script = """
            import errno
            import sys
            try:
                with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
                    connection.sendall(sys.argv[3].encode())
                    connection.shutdown(socket.SHUT_WR)
                    got = b""
                    while piece := connection.recv(65536):
                        got += piece
                    print(got.decode())
            except OSError as error:
                # A reset between the two sends leaves nothing to shut down.
                gone = isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN
                sys.exit(7 if gone else 1)
        """
        client = self.python(self.outside, script, address, str(port), message)
        said, _ = client.communicate(timeout=15)
        assert client.returncode in (0, 7)
        return said.strip() if client.returncode == 0 else None

    @contextmanager
    def serving(self, address: str, port: int = PORT):
        script = "server = listen(sys.argv[1], int(sys.argv[2])); print('ready', flush=True)\nwhile True: answer(server)"
        server = self.python(self.inside, script, address, str(port))
        try:
            assert server.stdout.readline() == "ready\n"
            yield server
        finally:
            server.kill()
            server.wait(10)


@pytest.fixture
def wire():
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("no forwarded port was tested: network namespaces need root and iproute2")
    wire = Wire()
    try:
        wire.up()
        yield wire
    finally:
        wire.down()


@pytest.fixture
def agent_in(wire, tmp_path):
    """guestd in the inner namespace; its pid."""
    log = tmp_path / "stderr"
    command = [str(locations.guestd()), "serve", "--code-port", str(CODE_PORT), "--forward-to", INSIDE, "--forward-to", INSIDE6]
    with open(log, "wb") as file:
        agent = wire.popen(wire.inside, *command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        wait_until(lambda: "listening" in log.read_text(), within=10, what="guestd listens")
        if "are not forwarded" in log.read_text():
            pytest.skip(f"no forwarded port was tested: {log.read_text()}")
        yield agent.pid
    finally:
        agent.terminate()
        agent.wait(10)
        sys.stderr.write(log.read_text())


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1", "127.0.0.53"])
def test_a_server_on_a_loopback_address_is_reached(wire, agent_in, address):
    with wire.serving(address):
        told = wait_until(lambda: wire.ask("hello"), within=5, what="the server is reached")
        assert wire.ask("hello", address=INSIDE6) == told
        assert told.split() == [address.replace("localhost", "127.0.0.1").replace("127.0.0.53", "127.0.0.1"), "hello"]
    # Its own answer again: refused, not accepted and dropped.
    wait_until(lambda: wire.ask("gone?") is None, within=5, what="the port is closed")


def test_a_port_that_comes_again_is_forwarded_again(wire, agent_in):
    for round_ in range(5):
        with wire.serving("127.0.0.1" if round_ % 2 else "::1"):
            wait_until(lambda: wire.ask(f"{round_}"), within=5, what=f"round {round_}")


def test_a_program_that_moves_from_loopback_to_all_addresses_finds_its_port_free(wire, agent_in):
    mover = wire.python(
        wire.inside,
        """
        server = listen("127.0.0.1", 8000)
        print("loopback", flush=True)
        held = server.accept()
        print("accepted", flush=True)
        for _ in range(100):
            server.close()
            server = listen("0.0.0.0", 8000)
            server.close()
            server = listen("127.0.0.1", 8000)
        server.close()
        server = listen("0.0.0.0", 8000)
        print("everywhere", flush=True)
        answer(server)
        """,
    )
    holder = None
    try:
        assert mover.stdout.readline() == "loopback\n"
        # A connection through the agent stays open all the time.
        holder = wire.python(
            wire.outside,
            f"""
            import time
            deadline = time.monotonic() + 5
            while True:
                try:
                    connection = socket.create_connection(("{INSIDE}", 8000), 5)
                    connection.sendall(b"x")
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            print("held", flush=True)
            sys.stdin.readline()
            """,
        )
        assert (holder.stdout.readline(), mover.stdout.readline()) == ("held\n", "accepted\n")
        assert mover.stdout.readline() == "everywhere\n", "its port was taken"
        time.sleep(0.3)
        # Reached directly: it sees the client's own address.
        assert wire.ask("direct") == f"{OUTSIDE} direct"
    finally:
        for program in (mover, holder):
            if program:
                program.kill()
                program.wait(10)


def test_a_large_answer_arrives_whole_after_the_clients_side_closed(wire, agent_in):
    with wire.serving("127.0.0.1"):
        wait_until(lambda: wire.ask("x"), within=5, what="the server is reached")
        assert wire.ask("y" * 100_000) == "127.0.0.1 " + "y" * 100_000


def test_the_agents_own_ports_are_not_forwarded(wire, agent_in):
    """Whoever came through would be the agent's own user to it, and served without a token."""
    with wire.serving("127.0.0.1"):
        wait_until(lambda: wire.ask("x"), within=5, what="another port is forwarded")
        for port in (49983, CODE_PORT):
            assert wire.ask("x", port=port) is None


def switches(pid: int) -> int:
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1])


# The kernel tells of each listener of the machine, those of other tests too: this one needs the machine for itself.
@pytest.mark.soak
@pytest.mark.takes(25)
def test_nothing_wakes_the_agent_while_nobody_begins_or_ceases_to_listen(wire, agent_in):
    with wire.serving("127.0.0.1"):
        wait_until(lambda: wire.ask("x"), within=5, what="the server is reached")
        # Whoever listens anywhere on this machine is heard, and the thread that reads the tables is kept for 10 s: a quiet time is awaited.
        def quiet() -> bool:
            before = switches(agent_in)
            time.sleep(4)
            return switches(agent_in) == before

        wait_until(quiet, within=60, what="four seconds without a wake-up")
        assert wire.ask("y"), "and it is still there"


def test_a_program_that_listens_and_closes_in_a_loop_costs_a_bounded_number_of_readings(wire, agent_in):
    storm = "import time\nend = time.monotonic() + 3\nn = 0\nwhile time.monotonic() < end:\n  listen('127.0.0.1', 9000).close(); n += 1\nprint(n)"
    before = switches(agent_in)
    program = wire.python(wire.inside, storm)
    said, _ = program.communicate(timeout=20)
    assert int(said) > 3_000, "it was no storm"
    assert switches(agent_in) - before < 1_500
    with wire.serving("127.0.0.1"):
        wait_until(lambda: wire.ask("after"), within=5, what="the next server is reached")


def test_a_tunnel_reaches_a_server_that_listens_on_one_other_address_only(guestd, agent):
    control = {"X-Guestd-Control": "secret"}
    assert agent.post("/init", json={"accessToken": "t"}, headers=control).status_code == 204
    with socket.socket() as server:
        server.bind(("127.0.0.77", 0))
        server.listen()
        with socket.create_connection(("127.0.0.1", guestd.port), 5) as tunnel:
            head = f"CONNECT 127.0.0.1:{server.getsockname()[1]} HTTP/1.1\r\nHost: x\r\nX-Guestd-Control: secret\r\n\r\n"
            tunnel.sendall(head.encode())
            assert tunnel.recv(1000).startswith(b"HTTP/1.1 200")
            inside, _ = server.accept()
            with inside:
                inside.sendall(b"hello")
                assert tunnel.recv(100) == b"hello"


@pytest.mark.vms(1)
def test_the_kernel_of_a_microvm_can_forward(machines):
    """A second agent in the machine, whose loopback device gets the address."""
    from e2b import Sandbox

    sandbox = Sandbox.create(**machines.sdk())
    sandbox.files.write("/tmp/guestd", locations.guestd().read_bytes(), user="root")
    sandbox.commands.run(f"chmod 755 /tmp/guestd && ip addr add {INSIDE}/32 dev lo", user="root")
    agent = f"/tmp/guestd serve --port 50001 --forward-to {INSIDE}"
    sandbox.commands.run(f"{agent} >/tmp/log 2>&1", user="root", background=True, timeout=0)
    sandbox.commands.run("python3 -m http.server --directory /usr/share --bind 127.0.0.1 8000", background=True, timeout=0)
    fetch = f"for n in $(seq 50); do curl -sf -o /dev/null http://{INSIDE}:8000/ && exit 0; sleep 0.2; done; cat /tmp/log; exit 1"
    done = sandbox.commands.run(fetch, timeout=60)
    assert done.exit_code == 0
