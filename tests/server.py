"""A server on this machine for tests of downloads, which can be made to misbehave."""

import hashlib
import http.server
import re
import time

import numpy as np


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with the options of a test, and notes the headers that were sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"
        self.content = np.random.default_rng(0).bytes(300_000)
        self.ranges = True  # serve them; "lax": whatever If-Range says
        self.etag = True  # send one
        self.cut: int | None = None  # bytes after which the connection breaks
        self.stall = False  # instead of breaking, wait
        self.length: str | None = ""  # what is announced; "" the truth, None nothing
        self.status = 200
        self.moved: dict[str, str] = {}  # path -> where it redirects to
        self.requests: list[dict[str, str]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        server.requests.append({key.lower(): value for key, value in self.headers.items()})
        if self.path in server.moved or server.status != 200:
            self.send_response(302 if self.path in server.moved else server.status)
            self.send_header("Location", server.moved.get(self.path, ""))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = f'"{digest(server.content)[:8]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = server.ranges == "lax" or self.headers.get("If-Range", etag) == etag
        start = int(asked[1]) if asked and server.ranges and same else 0
        body = server.content[start:]
        self.send_response(416 if start and not body else 206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", etag)
        if server.length is not None:
            self.send_header("Content-Length", server.length or str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.cut])
        if server.stall:
            self.wfile.flush()
            time.sleep(1)

    def log_message(self, format, *args):
        pass
