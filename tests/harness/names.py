"""Names for programs that resolve them as on any machine: a name server on the loopback interface, and a view of /etc that points to it.

`*.localhost` is resolved by systemd-resolved, browsers and some libraries by themselves, and by glibc's `files dns` not at all. A mount
namespace of its own gives one program another resolv.conf; the program and the machine stay as they are.
"""

import os
import random
import socket
import struct
import tempfile
import threading
from pathlib import Path

import pytest

SWITCH = "passwd: files\ngroup: files\nhosts: files dns\n"
RUN = 'mount --bind "$1" /etc/resolv.conf && mount --bind "$2" /etc/nsswitch.conf && shift 2 && exec "$@"'
A = 1


class Names:
    """Answers 127.0.0.1 for everything below a domain, and nothing else."""

    def __init__(self, domain: str):
        if os.geteuid() != 0:
            pytest.skip("no wildcard name was tested: a name server and a mount namespace need root")
        self.domain = domain.lower()
        self.socket, address = self._listen()
        self.folder = tempfile.TemporaryDirectory(prefix="names-", dir="/tmp")
        self.resolv = Path(self.folder.name) / "resolv.conf"
        self.resolv.write_text(f"nameserver {address}\n")
        self.switch = Path(self.folder.name) / "nsswitch.conf"
        self.switch.write_text(SWITCH)
        threading.Thread(target=self._serve, daemon=True).start()

    @staticmethod
    def _listen() -> tuple[socket.socket, str]:
        """Each process of the tests has an address of its own."""
        while True:
            address = f"127.53.{random.randrange(256)}.{random.randrange(1, 255)}"
            listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                listening.bind((address, 53))
                return listening, address
            except OSError:
                listening.close()

    def through(self) -> list[str]:
        """Words to put before a command."""
        return ["unshare", "--mount", "--", "sh", "-c", RUN, "sh", str(self.resolv), str(self.switch)]

    def close(self) -> None:
        self.socket.close()
        self.folder.cleanup()

    def _serve(self) -> None:
        while True:
            try:
                question, sender = self.socket.recvfrom(512)
                self.socket.sendto(self._answer(question), sender)
            except (OSError, IndexError, struct.error):
                if self.socket.fileno() < 0:
                    return

    def _answer(self, packet: bytes) -> bytes:
        """RFC 1035 sections 4.1 and 3.2."""
        labels, at = [], 12
        while size := packet[at]:
            labels.append(packet[at + 1 : at + 1 + size].decode("ascii", "replace").lower())
            at += 1 + size
        question = packet[12 : at + 5]
        (kind,) = struct.unpack(">H", packet[at + 1 : at + 3])
        name = ".".join(labels)
        known = name == self.domain or name.endswith(f".{self.domain}")
        answers = known and kind == A
        head = packet[:2] + struct.pack(">HHHHH", 0x8580 | (0 if known else 3), 1, int(answers), 0, 0)
        record = b"\xc0\x0c" + struct.pack(">HHIH", A, 1, 1, 4) + bytes([127, 0, 0, 1])
        return head + question + (record if answers else b"")
