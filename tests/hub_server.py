"A hub on loopback: repositories of model folders by revision, served by the routes that huggingface_hub asks."

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|refs|tree)(?:/(?P<revision>[^/?]+))?)?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def commit(folder: Path) -> str:
    "What stands for the commit of a revision: a hash of its files."
    digest = hashlib.sha1()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class Hub:
    "Repositories `{name: {revision: folder}}`, the requests seen, and files whose first download breaks off."

    def __init__(self, repositories: dict[str, dict[str, Path]]):
        self.repositories, self.requests, self.breaking = repositories, [], set()

    def folder(self, repo: str, revision: str) -> Path | None:
        revisions = self.repositories[repo]
        return revisions.get(revision) or next((f for f in revisions.values() if commit(f) == revision), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", X_Error_Code=code, X_Error_Message=code)

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        found = _API.fullmatch(path) or _FILE.fullmatch(path)
        if not found or found["repo"] not in hub.repositories:
            return self._missing("RepoNotFound")
        asked = found.groupdict()
        if asked.get("what") == "refs":
            refs = [
                dict(name=r, ref=f"refs/heads/{r}", targetCommit=commit(f))
                for r, f in hub.repositories[asked["repo"]].items()
            ]
            return self._json(dict(branches=refs, tags=[], converts=[]))
        folder = hub.folder(asked["repo"], asked["revision"] or "main")
        if folder is None:
            return self._missing("RevisionNotFound")
        return self._file(folder, asked["file"]) if "file" in asked else self._listing(folder, asked)

    do_HEAD = do_GET

    def _listing(self, folder: Path, asked: dict) -> None:
        files = sorted(folder.iterdir())
        if asked["what"] == "tree":
            rows = [dict(type="file", path=f.name, size=f.stat().st_size, oid=commit(folder)) for f in files]
            return self._json(rows)
        names = [dict(rfilename=f.name) for f in files]
        self._json(dict(id=asked["repo"], modelId=asked["repo"], sha=commit(folder), siblings=names, tags=[]))

    def _file(self, folder: Path, name: str) -> None:
        file = folder / name
        if not file.is_file():
            return self._missing("EntryNotFound")
        body = file.read_bytes()
        headers = dict(ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=commit(folder), Accept_Ranges="bytes")
        if self.command == "GET" and name in self.server.hub.breaking:
            self.server.hub.breaking.discard(name)
            self.send_response(200)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return None
        if start := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(start[1])
            part = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return self._send(206, body[first:], Content_Range=part, **headers)
        return self._send(200, body, **headers)


@contextmanager
def serve(repositories: dict[str, dict[str, Path]]):
    "(address, Hub) of a running server; it ends with the block."
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.hub = True, Hub(repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
