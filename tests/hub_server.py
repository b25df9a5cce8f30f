"""A stand-in for the Hugging Face hub: a data set of four training shards and one of validation."""

import gzip
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class FakeHub:
    """A data set nobody/c4 behind the two addresses of the hub that are used, with faults on demand.

    `faults[name]` is a list that requests for a file (or for "tree") use up: a status, a pair of a
    status and headers, "drop", which closes the connection in the middle of the answer, or "short",
    which ends in good order with half of it.
    """

    def __init__(self, files):
        self.files, self.faults, self.requests, self.page = files, {}, Counter(), 3
        self.ranges, self.gone = [], False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                fake.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def answer(self, request):
        if self.gone:
            request.close_connection = True
            return
        address = urlsplit(request.path)
        is_tree = address.path == "/api/datasets/nobody/c4/tree/main/en"
        name = "tree" if is_tree else address.path.removeprefix("/datasets/nobody/c4/resolve/main/en/")
        self.requests[name] += 1
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault not in (None, "drop", "short"):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.send(request, status, headers, b"")
        elif is_tree:
            self.send(request, 200, *self.tree(parse_qs(address.query)), fault)
        elif name in self.files:
            self.send_file(request, self.files[name], fault)
        else:
            self.send(request, 404, {}, b"")

    def tree(self, query):
        first = int(query.get("cursor", ["0"])[0])
        entries = [
            {"type": "file", "oid": "0", "path": f"en/{name}", "size": len(content)}
            for name, content in self.files.items()
        ]
        entries.append({"type": "directory", "oid": "0", "path": "en/c4-train-more", "size": 0})
        headers = {}
        if first + self.page < len(entries):
            # As behind a mirror: the link leads to another host.
            link = f"https://hub.invalid/api/datasets/nobody/c4/tree/main/en?cursor={first + self.page}"
            headers["Link"] = f'<{link}>; rel="next"'
        return headers, json.dumps(entries[first : first + self.page]).encode()

    def send_file(self, request, content, fault):
        wanted = request.headers.get("Range")
        if not wanted:
            return self.send(request, 200, {}, content, fault)
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.ranges.append(start)
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(request, 206, {"Content-Range": span}, content[start:], fault)

    def send(self, request, status, headers, body, fault=None):
        sent = body[: len(body) // 2] if fault else body
        request.send_response(status)
        for key, value in {**headers, "Content-Length": len(sent if fault == "short" else body)}.items():
            request.send_header(key, str(value))
        request.end_headers()
        request.wfile.write(sent)
        request.close_connection = request.close_connection or fault == "drop"

    def close(self):
        self.gone = True  # also for the connections that are kept alive
        self.server.shutdown()
        self.server.server_close()


def texts(shard, n=50):
    return [f"shard {shard} document {i} " + "x" * (i % 7) for i in range(n)]


def packed(lines):
    return gzip.compress("".join(json.dumps({"text": line}) + "\n" for line in lines).encode(), mtime=0)


TRAIN = [f"c4-train.{i:05d}-of-00004.json.gz" for i in range(4)]
VALIDATION = ["c4-validation.00000-of-00001.json.gz"]


def c4_files():
    """Return the files of the data set by name, not in their order."""
    files = {name: packed(texts(i)) for i, name in reversed(list(enumerate(TRAIN)))}
    return {**files, VALIDATION[0]: packed(texts("v")), "README.md": b"# C4"}
