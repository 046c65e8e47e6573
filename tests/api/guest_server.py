"""Runs inside a sandbox: a web server with nothing but the standard library. Usage: guest_server.py PORT [ADDRESS]

/echo        the request, told back as JSON
/slow        five lines, 0.4 s apart
/socket      a WebSocket that echoes text and binary messages
"""

import base64
import hashlib
import http.server
import json
import struct
import sys
import time


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/slow":
            self.slow()
        elif self.path == "/socket":
            self.socket()
        else:
            self.echo()

    do_POST = do_GET

    def echo(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        told = {"method": self.command, "path": self.path, "headers": {name.lower(): value for name, value in self.headers.items()}, "length": len(body)}
        answer = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def slow(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for n in range(5):
            self.wfile.write(b"2\r\n%d\n\r\n" % n)
            time.sleep(0.4)
        self.wfile.write(b"0\r\n\r\n")

    def socket(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        while True:
            opcode, payload = self.read_message()
            head = bytes([0x80 | opcode])
            size = len(payload)
            head += bytes([size]) if size < 126 else b"\x7e" + struct.pack(">H", size) if size < 65536 else b"\x7f" + struct.pack(">Q", size)
            self.wfile.write(head + payload)
            if opcode == 8:
                self.close_connection = True
                return

    def read_message(self):
        first, second = self.rfile.read(2)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack(">H", self.rfile.read(2))
        elif size == 127:
            (size,) = struct.unpack(">Q", self.rfile.read(8))
        mask = self.rfile.read(4)
        masked = self.rfile.read(size)
        repeated = (mask * (size // 4 + 1))[:size]
        return first & 0x0F, (int.from_bytes(masked, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")


http.server.ThreadingHTTPServer((sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
