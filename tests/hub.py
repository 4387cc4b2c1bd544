"""A server on loopback that answers what the client of the Hugging Face hub asks.

Several repositories, files in memory or on disk, ranges, and the ways in which downloads go wrong.
The client reads its address from the environment when it is imported, so each use of it is a
process of its own, as it is for people; ``hub_environment`` is what such a process needs.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Content = bytes | Path


@dataclass
class Hub:
    """What the server has, how it is to behave, and what it was asked.

    Attributes:
        files: ``ORG/REPO/FILE`` to content, or to the file on disk with the content.
        commit: the one revision of every repository; it may be asked for by a prefix, or as main.
        announced: the hash that it gives for every file; default: the content's true sha256.
        status: of every answer; default: the right one.
        breaks_off: whether every download ends half way.
        breaks_at: where the next downloads break off, in bytes sent; each is used once.
        stalls_at: after how many bytes a download stands still, until ``go_on`` is set.
        ranges: whether it answers requests for a part of a file.
        elsewhere: whether it sends the client to another server for the content, as the hub does.
        headers: more of them, with every file.
        requests: what it was asked: the method, the path, and the range if one was asked for.
        sent: for each download, from where to where bytes were sent.
        tokens: the hosts that were given a token.
        url: its address.
    """

    files: dict[str, Content]
    commit: str
    announced: str = ""
    status: int = 0
    breaks_off: bool = False
    breaks_at: list[int] = field(default_factory=list)
    stalls_at: int | None = None
    go_on: threading.Event = field(default_factory=threading.Event)
    ranges: bool = True
    elsewhere: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: list[tuple[int, int]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    @property
    def content(self) -> bytes:
        """Of the only file, or the first."""
        found = next(iter(self.files.values()))
        return found if isinstance(found, bytes) else found.read_bytes()

    @content.setter
    def content(self, content: Content) -> None:
        self.files[next(iter(self.files))] = content

    @property
    def downloads(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET ")]

    def answer(self, path: str) -> tuple[int, dict[str, str], Content]:
        if self.status:
            return self.status, {}, b"no"
        if path.startswith("/elsewhere/"):
            return 200, {}, self.files[path.removeprefix("/elsewhere/")]
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not match or not any(name.startswith(f"{match[1]}/") for name in self.files):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"Repository not found"
        if not self.commit.startswith(match[2]) and match[2] != "main":
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id"
        facts = {"X-Repo-Commit": self.commit}
        content = self.files.get(f"{match[1]}/{match[3]}")
        if content is None:
            return 404, {**facts, "X-Error-Code": "EntryNotFound"}, b"Entry not found"
        etag = self.announced or sha256(content)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size(content))}
        facts = {**facts, **linked, **self.headers}
        if self.elsewhere:
            other = self.url.replace("127.0.0.1", "localhost")
            location = f"{other}/elsewhere/{match[1]}/{match[3]}"
            return 302, {**facts, "Location": location}, b"Found"
        return 200, {**facts, "ETag": f'"{etag}"'}, content


def size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


_hashes: dict[tuple[Path, int], str] = {}


def sha256(content: Content) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    key = (content, content.stat().st_mtime_ns)
    if key not in _hashes:  # asked for at every request
        digest = hashlib.sha256()
        with content.open("rb") as file:
            while data := file.read(1 << 20):
                digest.update(data)
        _hashes[key] = digest.hexdigest()
    return _hashes[key]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server; its address is then ``hub.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.give(with_body=False)

        def do_GET(self) -> None:
            self.give(with_body=True)

        def give(self, *, with_body: bool) -> None:
            asked = self.headers.get("Range", "")
            hub.requests.append(f"{self.command} {self.path} {asked}".rstrip())
            if "Authorization" in self.headers:
                hub.tokens.add(self.headers["Host"].partition(":")[0])
            status, headers, content = hub.answer(self.path)
            start, end = 0, size(content)
            part = re.fullmatch(r"bytes=(\d+)-", asked)
            if part and hub.ranges and status == 200:
                start = int(part[1])
                if start >= end:
                    status, start, content = 416, 0, b""
                    end = 0
                else:
                    status = 206
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(end - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                with suppress(ConnectionError):  # the client is gone, or was killed
                    self.give_body(content, start, end)

        def give_body(self, content: Content, start: int, end: int) -> None:
            if hub.breaks_off:
                end = start + (end - start) // 2
            if hub.breaks_at:
                end = min(end, start + hub.breaks_at.pop(0))
            number = len(hub.sent)
            hub.sent.append((start, start))
            at = start
            while at < end:
                if hub.stalls_at is not None and at - start >= hub.stalls_at:
                    self.wfile.flush()
                    hub.go_on.wait(60)
                data = piece(content, at, min(end, at + (1 << 20)))
                self.wfile.write(data)
                at += len(data)
                hub.sent[number] = (start, at)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            hub.go_on.set()
            server.shutdown()
            thread.join()


def piece(content: Content, start: int, end: int) -> bytes:
    if isinstance(content, bytes):
        return content[start:end]
    with content.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def hub_environment(hub: Hub, home: Path, **more: str | None) -> dict[str, str | None]:
    """The variables of a process that asks this server and keeps what it gets under ``home``."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "HF_HUB_CACHE": None,
        "HUGGINGFACE_HUB_CACHE": None,
        "HF_TOKEN": None,
        "HF_HUB_OFFLINE": None,
        "AESTHETIC_FILTER_MODEL_DIR": None,
        **more,
    }
