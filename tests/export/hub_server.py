"""As much of the Hugging Face hub as pushing and loading a model needs, with repositories in memory."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "a" * 40


class HubServer(ThreadingHTTPServer):
    """Repositories by name, each a mapping from file names to bytes; the authorisations that uploads came with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large_files: dict[str, bytes] = {}
        self.authorisations: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_PUT(self) -> None:
        self.server.large_files[self.path.rpartition("/")[2]] = self.body()
        self.answer(200)

    def do_POST(self) -> None:
        path, data = urlsplit(self.path).path, self.body()
        self.server.authorisations.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.repositories[name] = {}
            self.answer(200, {"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [file["path"] for file in json.loads(data)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            kinds = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.answer(200, {"files": kinds})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(data)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), data)
        else:
            self.answer(404, {"error": path})

    def commit(self, name: str, data: bytes) -> None:
        files = self.server.repositories[name]
        for record in map(json.loads, data.splitlines()):
            value = record["value"]
            if record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        name, files = "/".join(parts[:2]), self.server.repositories.get("/".join(parts[:2]))
        if parts[2:3] != ["resolve"] or files is None:
            self.answer(404, {"error": name}, X_Error_Code="RepoNotFound")
        elif (file := "/".join(parts[4:])) not in files:
            self.answer(404, {"error": file}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            self.answer(200, files[file], ETag=etag, X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()
