"""Work on a Ray cluster, with Ray Data: reading, decoding and embedding are operators of their own.

Images are read and decoded by tasks on every node, embedded by a pool of actors that hold the
weights (and a GPU, or part of one), scored by tasks; stored embeddings are scored where they are
read. Scheduling, backpressure, retries and lost nodes are Ray Data's. What arrives at the driver,
in any order, is put in order again there, shard by shard, and written as on one machine: so the
folder of scores, what is finished in it and how to go on from it are the same.

A row of the dataset is not an image but a table of some, as bytes: shards may differ in their
columns, and Ray need not know.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from aesthetic_filter import errors, kernels
from aesthetic_filter.backends import Plan
from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.errors import (
    AestheticFilterError,
    ClusterError,
    CutShortError,
    MissingExtraError,
    ShardError,
    SourceError,
    WrongEmbeddingsError,
)
from aesthetic_filter.formats import Shard, Wanted, formats
from aesthetic_filter.journal import Journal
from aesthetic_filter.run_folder import Part, unwritable
from aesthetic_filter.stages import ImageEmbeddingStage
from aesthetic_filter.steps import LeaveOut, OwnStep, ScoreStep, Step
from aesthetic_filter.storage import Source
from aesthetic_filter.table import EMBEDDING, HEIGHT, SHA256, WIDTH, column_vectors

try:
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask
except ImportError as error:
    raise MissingExtraError("the backend ray needs Ray, which is not installed", "ray") from error

if TYPE_CHECKING:
    from aesthetic_filter.clip.encoder import Embedded, Encoder

GPU_SHARE = 0.25
"""Of a GPU, for each worker that embeds: four of them hide each other's copying."""

READ_CPUS = 0.5
"""Of a processor, for a task that reads images: it mostly waits."""

BLOCK_BYTES = 32 << 20
"""About how large a block of the dataset may become: some hundred images."""

OPEN_SHARDS = 16
"""Shards of embeddings read at once at most: more than one driver can write."""

TABLE_ROWS = 64
"""Images in one row of the dataset, at most."""

JOINED_ROWS = 65_536
JOINED_BYTES = 64 << 20
"""What a row of the dataset is made of, at most: rows, if of embeddings; bytes that were read."""

REACH_SECONDS = 5.0
"""How long a cluster may take to answer at all."""


class RayBackend:
    """A Ray cluster: the one there is, the one at an address, or one of our own on this machine.

    Args:
        address: ``HOST:PORT``, or "auto"; default: ``RAY_ADDRESS``, else a new Ray.
        workers: shards read at once; default: by the processors.

    Raises:
        ClusterError: it cannot be reached.
    """

    def __init__(self, address: str | None = None, *, workers: int | None = None) -> None:
        self._address = address
        self._workers = workers
        self._connected = _Connection.NONE
        self._stage: ImageEmbeddingStage | None = None
        self._described: dict[str, Any] = {}
        self._gpus = 0.0
        self._batch_size = 1
        self._notes: list[str] = []

    def __enter__(self) -> RayBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._connected in (_Connection.STARTED, _Connection.JOINED):
            ray.shutdown()

    def _connect(self) -> None:
        """Not before there is work for it: where all is done already, no cluster is needed."""
        if self._connected is _Connection.NONE:
            self._connected = _connect(self._address)

    def describe(self, stage: ImageEmbeddingStage) -> dict[str, Any]:
        """The encoder and the preprocessing as a worker of the cluster has them.

        Raises:
            ClusterError: there is no such GPU, or the workers lack the package.
            AestheticFilterError: whatever keeps the worker from embedding.
        """
        self._connect()
        self._gpus = self._gpus_for(stage.num_gpus_per_worker)
        options = stage.options
        if not self._gpus and options.device == "auto":
            options = replace(options, device="cpu")
        if options.weights is not None and "://" not in str(options.weights):
            options = replace(options, weights=_absolute(options.weights))
        # The nodes have neither this process's environment nor its working directory.
        models = stage.model_dir or os.environ.get("AESTHETIC_FILTER_MODEL_DIR")
        stage = replace(stage, options=options, model_dir=models and _absolute(models))
        probe = ray.remote(_probe).options(num_gpus=self._gpus, num_cpus=0, max_retries=0)
        self._described, self._batch_size = _get(probe.remote(stage))
        precision = self._described["encoder"]["precision"]
        self._stage = replace(stage, options=replace(options, precision=precision))
        return self._described

    def run(self, plan: Plan, shards: Sequence[Shard]) -> list[Part]:
        """Turn the shards into parts."""
        if not shards:
            return []
        self._connect()
        for note in self._notes:
            plan.recorder.note(note)
        assembly = _Assembly(plan, shards)
        with DataContext.current(_context(shards)), _quiet():
            dataset = self._dataset(plan, shards)
            batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            try:
                with assembly, closing(iter(batches)) as arriving:
                    for block in arriving:
                        for envelope in _unpack(block):
                            assembly.add(envelope)
            except ray.exceptions.RayError as error:
                raise _explained(error) from None
        assembly.check_all_arrived()
        return assembly.parts

    def _dataset(self, plan: Plan, shards: Sequence[Shard]) -> Any:
        """Reading, and the operators that follow it."""
        processors = int(ray.cluster_resources().get("CPU", 1))
        images = self._stage is not None and plan.embedding is not None
        first, rest = _until_special((*plan.before, *(() if images else plan.after)))
        at_once = self._workers or (max(2, processors) if images else min(processors, OPEN_SHARDS))
        source = _Shards(plan, shards, first, self._table_rows() if images else JOINED_ROWS)
        dataset = ray.data.read_datasource(
            source,
            override_num_blocks=len(shards),
            concurrency=min(at_once, len(shards)),
            num_cpus=READ_CPUS if images else 1,
        )
        dataset = _with_steps(dataset, rest)
        if self._stage is None or not images:
            return dataset
        decode = _Decode(self._stage.options, source.known, keep_images=plan.keep_images)
        dataset = self._encoders(_as_tasks(dataset, decode))
        return _with_steps(dataset, plan.after)

    def _encoders(self, dataset: Any) -> Any:
        assert self._stage is not None
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        if self._gpus:
            most = sum(int(n.get("GPU", 0) / self._gpus + 1e-9) for n in nodes)
            resources: dict[str, Any] = {"num_gpus": self._gpus, "num_cpus": 0}
        else:
            # One for each node, on all its processors: decoding stops when there is enough of it.
            most = sum(1 for n in nodes if n.get("CPU", 0) >= 1)
            # It reserves none: a part of one would cost a decoder, the only one where there is one.
            resources = {"num_cpus": 0}
        most = max(most, 1)
        batch = max(1, 4 * self._batch_size // TABLE_ROWS) if self._gpus else 1
        return dataset.map_batches(
            _EncodeWorker,
            fn_constructor_args=(self._stage, self._described),
            batch_size=batch,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
            **resources,
        )

    def _table_rows(self) -> int:
        """Images in one row of the dataset: few where each takes a second."""
        return TABLE_ROWS if self._gpus else min(TABLE_ROWS, max(16, self._batch_size))

    def _gpus_for(self, wished: float | None) -> float:
        there = max((n["Resources"].get("GPU", 0) for n in ray.nodes() if n["Alive"]), default=0)
        if wished is None:
            return GPU_SHARE if there else 0.0
        if wished <= there:
            return wished
        if not there and self._connected is _Connection.STARTED:
            self._notes.append("there is no GPU here: images are embedded on the processors")
            return 0.0
        raise ClusterError(
            f"a worker that embeds is to hold {wished:g} GPUs, and no node of the Ray cluster has "
            f"more than {there:g}; num_gpus_per_worker=0 embeds on the processors"
        )


class _Connection(Enum):
    """What this program has to do with the Ray it uses."""

    NONE = "not connected yet"
    FOUND = "somebody else in this program connected to it"
    JOINED = "we connected to it"
    STARTED = "we started it, on this machine"


def _connect(address: str | None) -> _Connection:
    """Connect to Ray.

    Raises:
        ClusterError: nobody answers there.
    """
    if ray.is_initialized():
        return _Connection.FOUND
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address == "local":
        _init(address, num_cpus=kernels.default_threads(), include_dashboard=False, **quiet)
        return _Connection.STARTED
    if "://" in address:
        raise ClusterError(
            f"{address}: Ray Data does not run through Ray's client; run the same on a machine of "
            "the cluster (`ray job submit`), or give HOST:PORT of its head, 6379 as a rule"
        )
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            _greet(host or address, int(port))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{address}: no Ray cluster answers there ({error}); start one with "
                "`ray start --head`, or leave the address out to run on this machine"
            ) from None
    _init(address, **quiet)
    return _Connection.JOINED


def _greet(host: str, port: int) -> None:
    """See that somebody speaks gRPC there: to others, Ray would talk for minutes.

    Raises:
        OSError: nobody does.
    """
    with socket.create_connection((host, port), REACH_SECONDS) as there:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return
        there.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)  # RFC 9113, 3.4
        answer = there.recv(9)
    if answer[3:4] != _SETTINGS[3:4]:
        raise OSError("what listens there is not Ray")


_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""An HTTP/2 frame of type 4, which has to be the first from either side."""


def _init(address: str, **options: Any) -> None:
    try:
        ray.init(address=address, **options)
    except Exception as error:  # of many kinds, and each with pages of advice
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        token = ""
        if address != "local" and "RAY_AUTH_MODE" not in os.environ:
            token = "; if the cluster asks for a token, set RAY_AUTH_MODE=token"
        raise ClusterError(f"Ray ({address}) cannot be used: {reason}{token}") from None


def _context(shards: Sequence[Shard]) -> DataContext:
    """Ray Data's settings for one run: the caller's own stay as they are."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.max_errored_blocks = 0  # a block that is lost is a shard that is lost
    processors = int(ray.cluster_resources().get("CPU", 1))
    share = sum(shard.size for shard in shards) // (8 * processors)
    context.target_max_block_size = max(1 << 20, min(BLOCK_BYTES, share))
    context.target_min_block_size = 1
    return context


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray Data's own remarks off the terminal; its log files have them."""
    handlers = [
        handler
        for handler in logging.getLogger("ray.data").handlers
        if not isinstance(handler, logging.FileHandler) and hasattr(handler, "stream")
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _probe(stage: ImageEmbeddingStage) -> tuple[dict[str, Any], int]:
    """Run on a worker: what it would embed with, and how many images at once."""
    from aesthetic_filter.clip.encoder import Encoder

    encoder = Encoder(stage.options, model_dir=stage.model_dir, quiet=True)
    return encoder.describe(), encoder.batch_size


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise _explained(error) from None


def _explained(error: BaseException) -> AestheticFilterError:
    """An error of ours as it was raised on a worker; else one line of Ray's."""
    cause: BaseException | None = error
    while cause is not None:
        raised = getattr(
            cause, "cause", None
        )  # Ray's own is of both kinds, with a traceback as text
        if isinstance(cause, AestheticFilterError) and raised is None:
            return cause
        cause = raised or cause.__cause__
    text = str(error)
    if "No module named 'aesthetic_filter" in text:
        return ClusterError(
            "aesthetic-filter is not installed on the Ray cluster's nodes: install the same "
            "version there, with the same extras, in the Python that Ray runs"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ClusterError(f"Ray: {lines[-1] if lines else type(error).__name__}")


# What travels: a table of some rows of one shard, in a row of the dataset.


@dataclass(frozen=True)
class _Envelope:
    """A table on its way.

    Attributes:
        shard: its number.
        start: the first row's number within the shard.
        rows: how many.
        size: bytes that were read for them.
        table: as an Arrow stream.
        end: "" for a table; for the last of a shard, what became of it, as JSON: "cut", "broken".
        note: something that a person should know.
    """

    shard: int
    start: int
    rows: int
    size: int
    table: Any
    end: str = ""
    note: str = ""

    def open(self) -> pa.Table:
        with pa.ipc.open_stream(pa.py_buffer(self.table)) as stream:
            return stream.read_all()

    def holding(self, table: pa.Table) -> _Envelope:
        return replace(self, table=_as_bytes(table))

    def broken(self, error: AestheticFilterError) -> _Envelope:
        return replace(self, table=b"", end=json.dumps({"broken": _told(error)}))


_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("start", pa.int64()),
        ("rows", pa.int64()),
        ("size", pa.int64()),
        ("end", pa.string()),
        ("note", pa.string()),
        ("table", pa.large_binary()),
    ]
)


def _as_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _pack(envelope: _Envelope) -> pa.Table:
    content = pa.py_buffer(envelope.table)
    offsets = pa.py_buffer(np.array([0, content.size], np.int64))
    table = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, content])
    plain = [[getattr(envelope, name)] for name in _SCHEMA.names[:-1]]
    return pa.table([*plain, table], schema=_SCHEMA)


def _unpack(block: pa.Table) -> Iterator[_Envelope]:
    columns = {name: block.column(name) for name in _SCHEMA.names}
    for row in range(block.num_rows):
        plain = {name: columns[name][row].as_py() for name in _SCHEMA.names[:-1]}
        yield _Envelope(**plain, table=columns["table"][row].as_buffer())


def _told(error: AestheticFilterError) -> list[str]:
    """An error as it travels: its class, and what it is made of."""
    return [type(error).__name__, *map(str, error.__reduce__()[1])]


def _heard(shard: str, told: Sequence[str]) -> AestheticFilterError:
    kind: type[AestheticFilterError] | None = getattr(errors, told[0], None)
    if kind is None:  # of somebody's own, in a stage
        return errors.StageError(f"{shard}: {told[0]}: {told[-1]}")
    if issubclass(kind, ShardError):
        return kind(shard, told[-1])
    made_of = list(told[1:])
    if issubclass(kind, _BROKEN) and not made_of[0].startswith(shard):
        made_of[0] = f"{shard}: {made_of[0]}"
    return kind(*made_of)


_BROKEN = (ShardError, SourceError, WrongEmbeddingsError)


# Read.


class _Shards(Datasource):
    """One read task for each shard."""

    def __init__(
        self, plan: Plan, shards: Sequence[Shard], steps: Sequence[Step], rows: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = sum(shard.size for shard in shards)
        self.known = {
            number: reference
            for number, shard in enumerate(shards)
            if plan.embedding is not None and (reference := _known(plan, shard)) is not None
        }
        opened = plan.opened
        self._tasks = [
            ReadTask(
                partial(
                    _read_shard,
                    opened.format,
                    replace(opened.source, files=()),
                    shard,
                    opened.wanted,
                    number,
                    tuple(steps),
                    rows,
                ),
                BlockMetadata(num_rows=None, size_bytes=shard.size, exec_stats=None),
            )
            for number, shard in enumerate(shards)
        ]

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int:
        return self._size

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        return self._tasks


def _known(plan: Plan, shard: Shard) -> Any:
    """What an earlier run had embedded of a shard, in the object store; None if nothing."""
    journal = plan.folder.journal(shard.name)
    try:
        return ray.put(journal.everything()) if len(journal) else None
    finally:
        journal.close()


def _read_shard(
    format_name: str,
    source: Source,
    shard: Shard,
    wanted: Wanted,
    number: int,
    steps: Sequence[Step],
    most_rows: int,
) -> Iterator[pa.Table]:
    """Run on a worker: a shard's tables, then what became of it."""
    start = 0
    end: dict[str, Any] = {}
    try:
        reader = formats()[format_name]
        for table, size in _together(reader.read(source, shard, wanted), steps, most_rows):
            yield _pack(_Envelope(number, start, table.num_rows, size, _as_bytes(table)))
            start += table.num_rows
    except CutShortError as error:
        end = {"cut": error.reason}
    except AestheticFilterError as error:  # Ray would put advice of its own into the message
        end = {"broken": _told(error)}
    yield _pack(_Envelope(number, start, 0, 0, b"", end=json.dumps(end)))


def _together(
    tables: Iterable[pa.Table], steps: Sequence[Step], most_rows: int
) -> Iterator[tuple[pa.Table, int]]:
    """The tables after some steps, in pieces of at most so many rows; small ones are joined.

    Yields:
        Each with the bytes that were read for it, about.
    """
    from aesthetic_filter.embedding import slices

    held: list[pa.Table] = []
    rows = size = 0
    try:
        for table in slices(tables, most_rows):
            done = table
            for step in steps:
                done = step(done)
            fits = not held or held[0].schema.equals(done.schema, check_metadata=True)
            full = rows + done.num_rows > most_rows or size > JOINED_BYTES
            if held and (full or not fits):
                yield pa.concat_tables(held), size
                held, rows, size = [], 0, 0
            held.append(done)
            rows, size = rows + done.num_rows, size + table.nbytes
    except CutShortError:
        if held:
            yield pa.concat_tables(held), size
        raise
    if held:
        yield pa.concat_tables(held), size


# Operators.


def _with_steps(dataset: Any, steps: Sequence[Step]) -> Any:
    for some in _grouped(steps):
        special = _resources(some[0])
        if special:
            dataset = _as_actors(dataset, some, special)
        else:
            dataset = _as_tasks(dataset, _Apply(tuple(some)))
    return dataset


def _as_tasks(dataset: Any, work: Callable[[_Envelope], _Envelope]) -> Any:
    return dataset.map_batches(
        _each,
        fn_args=(work,),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
    )


def _as_actors(dataset: Any, steps: Sequence[Step], resources: dict[str, Any]) -> Any:
    gpus = resources.get("num_gpus", 0)
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    per = ("GPU", gpus) if gpus else ("CPU", 1)
    most = max(1, sum(int(n.get(per[0], 0) / per[1] + 1e-9) for n in nodes))
    return dataset.map_batches(
        _ApplyWorker,
        fn_constructor_args=(tuple(steps),),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=most),
        **resources,
    )


def _each(block: pa.Table, work: Callable[[_Envelope], _Envelope]) -> Iterator[pa.Table]:
    for envelope in _unpack(block):
        yield _pack(envelope if envelope.end else work(envelope))


@dataclass(frozen=True)
class _Apply:
    """Some steps, one after the other."""

    steps: tuple[Step, ...]

    def __call__(self, envelope: _Envelope) -> _Envelope:
        try:
            table = envelope.open()
            for step in self.steps:
                table = step(table)
        except AestheticFilterError as error:
            return envelope.broken(error)
        return envelope.holding(table)


class _ApplyWorker:
    """The same in an actor, for stages that hold something."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if isinstance(step, OwnStep):
                step.setup()
        self._apply = _Apply(steps)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        yield from _each(block, self._apply)


class _Decode:
    """Decode images; what an earlier run had embedded is taken from there."""

    def __init__(self, options: ImageOptions, known: dict[int, Any], *, keep_images: bool) -> None:
        self._options = options
        self._keep_images = keep_images
        self._known = known
        self._opened: dict[int, Callable[[str], Embedded | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def __call__(self, envelope: _Envelope) -> _Envelope:
        from aesthetic_filter.clip.encoder import preprocessing_for
        from aesthetic_filter.embedding import decode_table, without_images

        known = self._find(envelope.shard)
        decoded = decode_table(envelope.open(), preprocessing_for(self._options), known)
        return envelope.holding(decoded if self._keep_images else without_images(decoded))

    def _find(self, shard: int) -> Callable[[str], Embedded | None] | None:
        if shard not in self._known:
            return None
        if shard not in self._opened:
            self._opened[shard] = _finder(ray.get(self._known[shard]))
        return self._opened[shard]


def _finder(known: pa.Table) -> Callable[[str], Embedded | None]:
    from aesthetic_filter.clip.encoder import Embedded

    vectors, _ = column_vectors(known.column(EMBEDDING), 768)
    widths, heights = (known.column(name).to_numpy() for name in (WIDTH, HEIGHT))
    rows = {sha256: row for row, sha256 in enumerate(known.column(SHA256).to_pylist())}

    def find(sha256: str) -> Embedded | None:
        row = rows.get(sha256)
        if row is None:
            return None
        return Embedded(vectors[row], int(widths[row]), int(heights[row]), sha256)

    return find


class _EncodeWorker:
    """An actor with the encoder's weights, loaded once, from the disk of its node."""

    def __init__(self, stage: ImageEmbeddingStage, described: dict[str, Any]) -> None:
        from aesthetic_filter.clip.encoder import Encoder
        from aesthetic_filter.clip.tower import use_processors

        if stage.options.device == "cpu":  # Ray allows threads for as many as were reserved
            use_processors(kernels.default_threads())
        self._encoder: Encoder = Encoder(stage.options, model_dir=stage.model_dir, quiet=True)
        here = self._encoder.describe()
        if here != described:
            raise ClusterError(
                f"the nodes of the Ray cluster do not have the same encoder: {here['encoder']} on "
                f"{socket.gethostname()}, {described['encoder']} elsewhere"
            )
        self._notes: list[str] = []
        self._encoder.on_note = self._notes.append
        self._encoder.start()

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        from aesthetic_filter.embedding import encode_tables

        envelopes = list(_unpack(block))
        tables = [envelope.open() for envelope in envelopes if not envelope.end]
        encoded = iter(encode_tables(tables, self._encoder))
        for envelope in envelopes:
            if envelope.end:
                yield _pack(envelope)
                continue
            note = self._notes.pop(0) if self._notes else ""
            yield _pack(replace(envelope.holding(next(encoded)), note=note))


def _resources(step: Step) -> dict[str, Any]:
    """What a step's workers hold, if it has to run in an actor; else nothing."""
    gpus = step.num_gpus if isinstance(step, ScoreStep | OwnStep) else 0
    if gpus:
        return {"num_gpus": gpus, "num_cpus": 0}
    if isinstance(step, OwnStep) and step.has_setup:
        return {"num_cpus": 1}
    return {}


def _until_special(steps: Sequence[Step]) -> tuple[list[Step], list[Step]]:
    """The steps before the first that needs an actor, and the others."""
    place = next((n for n, step in enumerate(steps) if _resources(step)), len(steps))
    return list(steps[:place]), list(steps[place:])


def _grouped(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Runs of steps that go together: each that needs an actor alone, the others together."""
    left = list(steps)
    while left:
        some, left = _until_special(left)
        if not some:
            some, left = left[:1], left[1:]
            while left and isinstance(left[0], LeaveOut):
                some.append(left.pop(0))
        yield some


# On the driver again.


@dataclass
class _Open:
    """A shard of which something has arrived."""

    shard: Shard
    journal: Journal | None
    tables: dict[int, tuple[pa.Table, int]] = field(default_factory=dict)
    rows: int = 0
    promised: int | None = None
    cut: str = ""


class _Assembly:
    """Puts the tables of each shard in order, and writes its part when all of them are there."""

    def __init__(self, plan: Plan, shards: Sequence[Shard]) -> None:
        self.parts: list[Part] = []
        self._plan = plan
        self._shards = shards
        self._open: dict[int, _Open] = {}
        self._over: set[int] = set()
        self._writing: dict[Future[Part], int] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="aesthetic-filter-write")

    def __enter__(self) -> _Assembly:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._writing and error is None:
                self._collect()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            for future in self._writing:
                with suppress(BaseException):
                    self.parts.append(future.result())
                    self._plan.recorder.progress.finished += 1
            for shard in self._open.values():
                if shard.journal is not None:
                    shard.journal.close()

    def add(self, envelope: _Envelope) -> None:
        """Take in what has arrived.

        Raises:
            AestheticFilterError: the shard is broken, and that is not put up with.
        """
        if envelope.note:
            self._plan.recorder.note(envelope.note)
        number = envelope.shard
        if number in self._over:
            return
        shard = self._open.get(number) or self._begin(number)
        if envelope.end:
            end = json.loads(envelope.end)
            if "broken" in end:
                self._broken(number, _heard(shard.shard.name, end["broken"]))
                return
            shard.promised, shard.cut = envelope.start, end.get("cut", "")
        elif envelope.start not in shard.tables:
            table = _own_memory(envelope)
            if shard.journal is not None:
                shard.journal.add(_embedded(table))
            shard.tables[envelope.start] = (table, envelope.size)
            shard.rows += envelope.rows
            self._plan.recorder.rows(shard.shard, table, envelope.size)
        if shard.rows == shard.promised:
            self._finish(number, shard)

    def check_all_arrived(self) -> None:
        """Raise :class:`ClusterError` where a shard has neither a part nor a reason why not."""
        lost = [s.name for number, s in enumerate(self._shards) if number not in self._over]
        if lost:
            raise ClusterError(
                f"Ray lost {len(lost):,} shard(s), {lost[0]} among them; run the same again"
            )

    def _begin(self, number: int) -> _Open:
        shard = self._shards[number]
        images = self._plan.embedding is not None
        journal = self._plan.folder.journal(shard.name) if images else None
        self._open[number] = _Open(shard, journal)
        return self._open[number]

    def _finish(self, number: int, shard: _Open) -> None:
        self._over.add(number)
        del self._open[number]
        self._writing[self._pool.submit(self._write, shard)] = number
        while len(self._writing) > 4:
            self._collect()

    def _collect(self) -> None:
        for future in wait(self._writing, return_when=FIRST_COMPLETED).done:
            number = self._writing.pop(future)
            try:
                self.parts.append(future.result())
            except _BROKEN as error:
                self._broken(number, error)
                continue
            except OSError as error:
                raise unwritable(self._plan.folder.path, error) from None
            self._plan.recorder.done(self._shards[number], finished=True)

    def _write(self, shard: _Open) -> Part:
        def tables() -> Iterator[pa.Table]:
            for start in sorted(shard.tables):
                yield shard.tables.pop(start)[0]
            if shard.cut:
                raise CutShortError(shard.shard.name, shard.cut)

        try:
            part = self._plan.write(shard.shard, tables())
        finally:
            if shard.journal is not None:
                shard.journal.close()
        if shard.journal is not None:
            shard.journal.remove()
        return part

    def _broken(self, number: int, error: AestheticFilterError) -> None:
        self._over.add(number)
        shard = self._open.pop(number, None)
        if shard is not None and shard.journal is not None:
            shard.journal.close()
        if not self._plan.keep_going or not isinstance(error, _BROKEN):
            raise error
        self._plan.broken(self._shards[number], getattr(error, "reason", str(error)))
        self._plan.recorder.done(self._shards[number], finished=False)


def _own_memory(envelope: _Envelope) -> pa.Table:
    """The envelope's table in memory of its own, so that the object store's can be used again."""
    copy = bytes(memoryview(envelope.table))
    return replace(envelope, table=copy).open()


def _embedded(table: pa.Table) -> Iterable[Embedded]:
    from aesthetic_filter.clip.encoder import Embedded

    vectors, _ = column_vectors(table.column(EMBEDDING), 768)
    there = table.column(EMBEDDING).is_valid().to_pylist()
    facts = (table.column(name).to_pylist() for name in (WIDTH, HEIGHT, SHA256))
    for row, (width, height, sha256) in enumerate(zip(*facts, strict=True)):
        if there[row] and sha256:
            yield Embedded(vectors[row], width, height, sha256)
