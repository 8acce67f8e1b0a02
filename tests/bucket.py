"""A bucket of Google Cloud Storage on this machine: the part of its JSON API that tensorstore and gcsfs speak.

Objects are in memory and put whole or not at all. Generations count up, and preconditions on them are held to, which
the emulator on PyPI does not do and does not tell on reading: a write that should lose a race would win it there.
"""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"


class Bucket:
    """What is in it.

    Attributes:
      objects: name -> (generation, data).
      refuses: whether writes are answered with "forbidden".
      requests: method, name, and query of each.
    """

    def __init__(self):
        self.objects, self.refuses, self.requests = {}, False, []
        self.lock, self.generation = threading.Lock(), 1_000

    def answer(self, method, path, query, headers, body):
        """(status, headers, body) of one request."""
        path = path.removeprefix("/upload").removeprefix("/download")
        match = re.fullmatch(rf"/storage/v1/b/{NAME}(/o/?)?(.*)", path)
        name = query.get("name") or (unquote(match[2]) if match else "")
        with self.lock:
            self.requests.append((method, name, query))
            if not match or (not match[1] and match[2]):
                return 404, {}, b""
            if not name:
                return (200, {}, self._list(query)) if match[1] else (200, {}, _json({"name": NAME}))
            if method in ("POST", "DELETE") and self.refuses:
                return 403, {}, b"forbidden"
            generation, data = self.objects.get(name, (0, b""))
            if int(query.get("ifGenerationMatch", generation)) != generation:
                return 412, {}, b""
            if method == "POST" and query["uploadType"] == "media":
                self.generation += 1
                self.objects[name] = self.generation, body
                return 200, {}, _json(self._about(name))
            if method not in ("GET", "DELETE"):
                return 501, {}, b""
            if not generation:
                return 404, {}, b""
            if method == "DELETE":
                del self.objects[name]
                return 204, {}, b""
            if int(query.get("ifGenerationNotMatch", -1)) == generation:
                return 304, {}, b""
            if query.get("alt") != "media":
                return 200, {}, _json(self._about(name))
            told = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(data))}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", "")):
                start, stop = int(part[1]), min(int(part[2] or len(data)) + 1, len(data))
                if start >= len(data):
                    return 416, told, b""
                return 206, {**told, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]
            return 200, told, data

    def _list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        names = [n for n in sorted(self.objects) if n.startswith(prefix) and n >= first and (not end or n < end)]
        folders = set()
        if delimiter:
            folders = {prefix + n[len(prefix) :].split(delimiter)[0] + "/" for n in names if "/" in n[len(prefix) :]}
            names = [n for n in names if "/" not in n[len(prefix) :]]
        # pages of three, so that whoever lists must ask again; from a name on, for those before may be gone by then
        rest = [name for name in names if name >= query.get("pageToken", "")]
        result = {"kind": "storage#objects", "items": [self._about(name) for name in rest[:3]]}
        result |= {"prefixes": sorted(folders)} if folders and "pageToken" not in query else {}
        result |= {"nextPageToken": rest[3]} if len(rest) > 3 else {}
        return _json(result)

    def _about(self, name):
        generation, data = self.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return {
            "kind": "storage#object", "bucket": NAME, "name": name, "generation": str(generation),
            "metageneration": "1", "size": str(len(data)), **times,
        }  # fmt: skip


def _json(value):
    return json.dumps(value).encode()


@contextlib.contextmanager
def serve():
    """(bucket, its address) while the server runs."""
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self):
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:  # whoever sent it was killed
                return
            status, headers, data = bucket.answer(self.command, url.path, query, self.headers, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = handle_one

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield bucket, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
