"""A Ray of the tests' own, whose workers tell what they do and can be held up."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

MARK = "AESTHETIC_FILTER_TEST_RAY"
"""The variable by which processes that a test began are known as its own."""

HOOK = """
import hashlib, os, sys, time
from importlib.machinery import PathFinder

FOLDER = {folder!r}

def note(name, line):
    log = os.open(os.path.join(FOLDER, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, (line + "\\n").encode())
    os.close(log)

def wait(name):
    held = os.path.join(FOLDER, "hold-" + name)
    if os.path.exists(held):
        note("held-" + name, str(os.getpid()))
        while os.path.exists(held):
            time.sleep(0.01)

def watch_preprocess(module):
    real = module.preprocess
    def preprocess(image, *more):
        wait("decode")
        note("decoded", hashlib.sha256(bytes(image)).hexdigest() + " " + str(os.getppid()))
        try:
            with open(os.path.join(FOLDER, "pause")) as pause:
                time.sleep(float(pause.read() or 0))
        except FileNotFoundError:
            pass
        return real(image, *more)
    module.preprocess = preprocess

def watch_tower(module):
    load, call = module.load_tower, module.Tower.__call__
    def load_tower(*given, **named):
        note("towers", str(os.getpid()))
        return load(*given, **named)
    def embed(*given, **named):
        wait("encode")
        return call(*given, **named)
    module.load_tower, module.Tower.__call__ = load_tower, embed

WATCHED = {{
    "aesthetic_filter.clip.preprocess": watch_preprocess,
    "aesthetic_filter.clip.tower": watch_tower,
}}

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in WATCHED:
            return None
        spec = PathFinder.find_spec(name, path)
        real = spec.loader.exec_module
        def exec_module(module):
            real(module)
            WATCHED[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""
"""``sitecustomize`` of every process that finds it: it logs, and waits where it is told to."""


class Watch:
    """What the workers did: each image they decoded, each time they loaded the encoder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True)
        (self.folder / "sitecustomize.py").write_text(HOOK.format(folder=str(folder)))

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def decoded(self) -> list[str]:
        """The sha256 of each image that was decoded, as often as it was."""
        return [line.split()[0] for line in self.lines("decoded")]

    @property
    def towers(self) -> list[int]:
        """The process that loaded the encoder, for each time that happened."""
        return [int(line) for line in self.lines("towers")]

    def clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix != ".py":
                path.unlink()

    @contextmanager
    def paused(self, seconds: float) -> Iterator[None]:
        """Decoding takes so much longer."""
        pause = self.folder / "pause"
        part = pause.with_suffix(".part")
        part.write_text(str(seconds))
        part.rename(pause)
        try:
            yield
        finally:
            pause.unlink()


class Hold:
    """A stage that waits for as long as a file is there, from its second table on."""

    def __init__(self, folder: Path, after: int = 1) -> None:
        self.folder = folder
        self.after = after
        self.calls = 0

    def __repr__(self) -> str:
        return "Hold"

    def __call__(self, table: pa.Table) -> pa.Table:
        self.calls += 1
        held = self.folder / "hold-stage"
        if self.calls > self.after and held.exists():
            with (self.folder / "held-stage").open("a") as log:
                log.write(f"{os.getpid()}\n")
            while held.exists():
                time.sleep(0.01)
        return table


class HoldWithSetup(Hold):
    """The same, in an actor."""

    def __repr__(self) -> str:
        return "HoldWithSetup"

    def setup(self) -> None:
        with (self.folder / "set-up").open("a") as log:
            log.write(f"{os.getpid()}\n")


@contextmanager
def killed_when_held(folder: Path, name: str) -> Iterator[list[int]]:
    """Kill the first worker that is held up at ``name``, then hold nobody up any more."""
    hold, held = folder / f"hold-{name}", folder / f"held-{name}"
    hold.touch()
    killed: list[int] = []

    def kill() -> None:
        try:
            until(lambda: held.exists() and held.read_text().endswith("\n"), hold.exists)
            if held.exists():
                killed.append(int(held.read_text().split()[0]))
                os.kill(killed[0], signal.SIGKILL)
                until(lambda: not psutil.pid_exists(killed[0]) or _is_zombie(killed[0]))
        finally:
            hold.unlink(missing_ok=True)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        hold.unlink(missing_ok=True)
        thread.join()


def _is_zombie(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def until(
    reached: Callable[[], Any], going: Callable[[], Any] = lambda: True, seconds: float = 90
) -> None:
    """Wait for something, for as long as something else holds; fail where it takes too long."""
    end = time.monotonic() + seconds
    while not reached() and going():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def surroundings(watch: Watch) -> Iterator[dict[str, str]]:
    """The environment of a Ray that is apart from every other on this machine, and goes whole.

    Ray's processes are known by a mark in their environment: those that are left are killed.
    """
    temporary = tempfile.mkdtemp(prefix="afr-", dir="/tmp")  # sockets want a short path
    mark = uuid.uuid4().hex
    changed = {
        "RAY_TMPDIR": temporary,
        "PYTHONPATH": os.pathsep.join([str(watch.folder), str(Path(__file__).parent)]),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray warns of how it will be
        "RAY_USAGE_STATS_ENABLED": "0",
        MARK: mark,
    }
    before = {name: os.environ.get(name) for name in (*changed, "RAY_ADDRESS")}
    os.environ.update(changed)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield changed
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        for process in marked(mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """The processes with this mark, less this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


@contextmanager
def command(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command line, running, in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "aesthetic_filter", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# What two runs left.


def parts_of(out: Path) -> dict[str, pa.Table]:
    """The parts, by name."""
    return {
        path.relative_to(out).as_posix(): pq.ParquetFile(path).read()
        for path in sorted(out.rglob("*.parquet"))
    }


def check_same(out: Path, twin: Path) -> None:
    """The parts of both are equal, with their metadata, bit for bit."""
    found, wanted = parts_of(out), parts_of(twin)
    assert list(found) == list(wanted)
    assert found
    for name, table in wanted.items():
        assert found[name].schema.metadata == table.schema.metadata, name
        assert found[name].schema.equals(table.schema, check_metadata=True), name
        assert found[name].equals(table), name


MEASURED = ("aesthetic_score", "embedding_norm", "reference_cosine", "embedding")
"""Of an image; these depend on the device, and on what shared its batch."""


def check_alike(out: Path, twin: Path, within: float) -> None:
    """The parts of both are equal, and what was measured of an image but for float16 rounding."""
    found, wanted = parts_of(out), parts_of(twin)
    assert list(found) == list(wanted)
    assert found
    for name, table in wanted.items():
        one = found[name]
        assert one.schema.equals(table.schema, check_metadata=True), name
        exact = [c for c in table.column_names if c not in MEASURED]
        assert one.select(exact).equals(table.select(exact)), name
        for column in MEASURED:
            ours, theirs = one.column(column), table.column(column)
            assert ours.is_valid().equals(theirs.is_valid()), (name, column)
            ours, theirs = (np.array(c.drop_null().to_pylist()) for c in (ours, theirs))
            furthest = np.abs(ours - theirs).max() if ours.size else 0.0
            assert furthest <= (2**-11 if column == "embedding" else within), (name, column)


def states(out: Path) -> dict[str, tuple[int, int]]:
    """The parts, and what changes when one is written again."""
    return {
        path.relative_to(out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.rglob("*.parquet")
    }
