"""Runs inside a sandbox: a stand-in for a code interpreter, with nothing but the standard library. Usage: code_server.py PORT

POST /execute   runs `code` and tells its output as NDJSON, a line as soon as there is one. The code can call `say(text)`, which waits
                until it is told that the line has arrived (POST /arrived), and `hang()`, which waits until the client goes.
GET /left       how many clients went during a hang()
"""

import contextlib
import http.server
import io
import json
import sys
import threading
import time

arrived = threading.Semaphore(0)
left = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.tell(200, {"/health": "OK", "/left": len(left)}.get(self.path))

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/arrived":
            arrived.release()
            return self.tell(200, None)
        asked = json.loads(body)
        if asked["code"] == "hang before the answer":
            return self.hang()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(asked["code"], {"say": self.say, "hang": self.hang})
        except Exception as error:
            self.line(type="error", name=type(error).__name__, value=str(error), traceback="")
        if output.getvalue():
            self.line(type="stdout", text=output.getvalue(), timestamp=time.time_ns())
        self.line(type="number_of_executions", execution_count=1)
        self.wfile.write(b"0\r\n\r\n")

    def line(self, **fields):
        text = json.dumps(fields).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))

    def say(self, text):
        self.line(type="stdout", text=text, timestamp=time.time_ns())
        if not arrived.acquire(timeout=20):
            raise TimeoutError("nobody says that the line has arrived")

    def hang(self):
        self.connection.settimeout(60)
        try:
            gone = not self.connection.recv(1)
        except ConnectionError:
            gone = True
        if gone:
            left.append(time.time())
        self.close_connection = True

    def tell(self, status, what):
        answer = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
