"""A Hugging Face hub with one dataset, on loopback, for tests and rehearsals, and ways to be refused.

    server = Hub({"shard_00000.parquet": raw, ...})       any OWNER/DATASET is this one
    env |= {"HF_ENDPOINT": server.url, ...}               for whoever calls data.py
    server.close()

It answers the URLs that huggingface_hub asks for to list and to download a dataset, and knows no others.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Listens from the start, on a free port of loopback. files: name -> bytes."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.sizes = files, {name: len(raw) for name, raw in files.items()}
        self.refusal: tuple[int, dict[str, str]] | None = None  # status and headers, to the first question
        self.slow, self.cut = (
            None,
            None,
        )  # files of which half is sent, then nothing | then, once, the connection is closed
        self.gets: list[str] = []  # names, as they were asked for
        self.let_go = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.let_go.set()
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    def do_HEAD(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        self.answer(
            200,
            headers={
                "Content-Length": str(self.server.sizes[name]),
                "ETag": f'"{name}"',
                "X-Repo-Commit": COMMIT,
            },
        )

    def do_GET(self) -> None:
        hub, parts = self.server, self.path.split("/")
        if parts[1:3] == ["api", "datasets"] and "tree" in parts:
            files = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in hub.sizes.items()]
            self.answer(
                200,
                json.dumps([*files, {"type": "file", "path": "README.md", "size": 3, "oid": "r"}]).encode(),
            )
        elif parts[1:3] == ["api", "datasets"]:
            status, headers = hub.refusal or (200, {})
            self.answer(status, json.dumps({"id": "/".join(parts[3:5]), "sha": COMMIT}).encode(), headers)
        else:
            self.send_file(self.path.rsplit("/", 1)[1])

    def send_file(self, name: str) -> None:
        hub, raw = self.server, self.server.files[name]
        hub.gets.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if name not in (hub.slow, hub.cut):
            self.wfile.write(raw)
            return
        self.wfile.write(raw[: len(raw) // 2])
        if name == hub.slow:
            hub.let_go.wait(60)
        hub.cut = None
