"""A review that is running: the command in a process of its own, and requests to it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """A running review.

    Attributes:
        address: of the page, with the token.
        labels: the label file.
        process: the command.
    """

    address: str
    labels: Path
    process: subprocess.Popen[str]

    @property
    def root(self) -> str:
        return self.address.partition("/?")[0]

    @property
    def token(self) -> str:
        return self.address.partition("token=")[2]

    def ask(
        self, path: str, body: Any = None, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        data = None if body is None else json.dumps(body).encode()
        given = {"content-type": "application/json", "x-token": self.token, **(headers or {})}
        request = urllib.request.Request(
            self.root + path, data, {k: v for k, v in given.items() if v}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
                return answer.status, content, dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), dict(error.headers)

    def post(self, path: str, **body: Any) -> Any:
        status, content, _ = self.ask(path, {"reviewer": "ann", **body})
        assert status == 200, content
        return json.loads(content)


@contextmanager
def serving(scores: Path, folder: Path, *options: str) -> Iterator[Server]:
    labels = folder / "labels.csv"
    command = [sys.executable, "-m", "aesthetic_filter", "review", str(scores), "--no-open"]
    command += ["--port", "0", "--labels", str(labels), "--reviewer", "ann", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise AssertionError(process.stderr.read() if process.stderr else "")
            yield Server(address, labels, process)
        finally:
            process.kill()
