"""A scores folder: one Parquet part for each shard, a lock, and ``_run.json``.

What is finished is told by the parts themselves, which appear whole or not at all; ``_run.json``
says what the run is, so that another head or source cannot mix into it. Nothing else is needed to
go on after ``kill -9``.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic_filter.errors import AestheticFilterError, CutShortError, OutputError, StageError
from aesthetic_filter.formats.parquet import GROUP_ROWS, regroup, rows_writer
from aesthetic_filter.journal import Journal
from aesthetic_filter.storage import natural_order
from aesthetic_filter.table import EMBEDDING, METADATA_KEY, SCORE
from aesthetic_filter.whole import UNFINISHED, write_whole

if TYPE_CHECKING:
    from aesthetic_filter.heads import Head

RUN_FILE = "_run.json"
COUNTS_KEY = b"aesthetic_filter_counts"
"""Where a part keeps what was counted while it was written, as JSON."""

SCHEMA_VERSION = 1
_LOCK = ".lock"
JOURNAL = ".embedded"

EMBEDDED_GROUP_ROWS = 8_192
""":data:`GROUP_ROWS` for rows with their embeddings, 1.5 KB each."""


@dataclass(frozen=True)
class Part:
    """A finished part.

    Attributes:
        path: the file.
        shard: the shard it was made from.
        version: that shard's version when it was read.
        counts: rows, failed and foreign rows.
        cut: why there are not more rows, where the shard ends too early; "" where it does not.
    """

    path: Path
    shard: str
    version: str
    counts: Mapping[str, int]
    cut: str = ""


class RunFolder:
    """An open, locked scores folder."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = identity

    def part_path(self, shard: str) -> Path:
        """Where a shard's part lies: under the shard's own relative path."""
        return self.path / f"{shard}.parquet"

    def journal(self, shard: str) -> Journal:
        """What is known of the embeddings of a shard of images: see :mod:`.journal`."""
        part = self.part_path(shard)
        return Journal(part.with_name(f"{shard.rpartition('/')[2]}{JOURNAL}"), part)

    def finished(self, shard: str, shard_version: str) -> Part | None:
        """The shard's part, if it is there and was made from this version of the shard."""
        part = read_part(self.part_path(shard))
        return part if part and part.version == shard_version else None

    def write_part(self, shard: str, version: str, tables: Iterable[tuple[pa.Table, int]]) -> Part:
        """Write a shard's part; it appears when it is whole.

        Args:
            shard: the shard's name.
            version: its version.
            tables: its rows with their results, each table with how many of its rows look
                foreign; at least one, if of no rows. Where one has columns that those before it
                had not, the part has them all.

        Raises:
            OSError: the part cannot be written.
            StageError: a column is of types that no common one holds.
        """
        final = self.part_path(shard)
        final.parent.mkdir(parents=True, exist_ok=True)
        counts = {"rows": 0, "failed": 0, "foreign": 0}
        cut = ""
        held: pa.Table | None = None

        def counted() -> Iterator[pa.Table]:
            nonlocal cut
            try:
                for table, foreign in tables:
                    counts["rows"] += table.num_rows
                    counts["failed"] += table.column(SCORE).null_count
                    counts["foreign"] += foreign
                    yield table
            except CutShortError as error:
                if not counts["rows"]:
                    raise
                cut = error.reason

        def fitting(schema: pa.Schema) -> Iterator[pa.Table]:
            nonlocal held
            while held is not None and _with_columns_of(schema, held).equals(schema):
                table, held = held, next(rows, None)
                yield _fit(table, schema)

        def counts_metadata() -> dict[bytes, str]:
            return {COUNTS_KEY: json.dumps({**counts, **({"cut": cut} if cut else {})})}

        stamp = json.dumps({**self.identity, "shard": shard, "shard_version": version})
        rows = counted()
        pieces: list[Path] = []
        held = next(rows, None)
        try:
            schema = pa.schema([])
            while held is not None:
                # A piece ends where a table has a column that none before it had, or had so wide.
                schema = _with_columns_of(schema, held).with_metadata(
                    {METADATA_KEY: stamp.encode()}
                )
                pieces.append(final.with_name(f"{final.name}.{len(pieces)}{UNFINISHED}"))
                with rows_writer(pieces[-1], schema) as writer:
                    for table in regroup(fitting(schema), schema, _group_rows(schema)):
                        writer.write_table(table)
                    writer.add_key_value_metadata(counts_metadata())
            if len(pieces) > 1:
                pieces.append(final.with_name(final.name + UNFINISHED))
                with rows_writer(pieces[-1], schema) as writer:
                    for table in regroup(
                        _read_back(pieces[:-1], schema), schema, _group_rows(schema)
                    ):
                        writer.write_table(table)
                    writer.add_key_value_metadata(counts_metadata())
            pieces[-1].replace(final)
        except pa.ArrowNotImplementedError as error:
            why = str(error).splitlines()[0]
            raise StageError(f"a column of the stages cannot be stored: {why}") from None
        finally:
            for path in pieces:
                path.unlink(missing_ok=True)
        return Part(final, shard, version, counts, cut)

    def parts(self) -> list[Path]:
        """The finished parts, of whichever run."""
        return list_parts(self.path)

    def write_run_file(self, status: str, **facts: Any) -> None:
        """Write ``_run.json``: what this run is, and how far it is.

        Raises:
            AestheticFilterError: it cannot be written.
        """
        try:
            write_json(self.path / RUN_FILE, {"status": status, **self.identity, **facts})
        except OSError as error:
            raise unwritable(self.path, error) from None


@contextmanager
def open_run_folder(
    path: Path, identity: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[RunFolder]:
    """Lock a scores folder for one run, new or continued.

    Args:
        path: the folder; made if it is not there.
        identity: what makes a run what it is: head, source, options.
        overwrite: remove what another run left there.

    Raises:
        OutputError: it holds another run's scores or other files, another run is writing to it,
            or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "?"
            raise OutputError(
                f"{path}: another run (process {holder}) is writing to it; "
                "wait for it, or give another --out"
            ) from None
        os.ftruncate(lock, 0)
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        _claim(path, identity, overwrite=overwrite)
        yield RunFolder(path, identity)
    finally:
        os.close(lock)


def _claim(path: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    found = read_run_file(path)
    if found is None:
        if scores_around(path):
            raise OutputError(f"{path}: lies in a folder of scores; give another --out")
        own = (_LOCK, RUN_FILE + UNFINISHED)  # the latter of a run that was killed just then
        strangers = [entry.name for entry in path.iterdir() if entry.name not in own]
        if strangers:
            raise OutputError(
                f"{path}: holds other files ({', '.join(sorted(strangers)[:3])}…) and no scores; "
                "give an empty or a new folder as --out"
            )
    elif overwrite:
        for old in (*list_parts(path), *path.rglob(f"*{JOURNAL}")):
            old.unlink()
    else:
        differences = [
            f"{what} {_short(there)} instead of {_short(asked)}"
            for what, there, asked in _differences(found, identity)
        ]
        if differences:
            raise OutputError(
                f"{path}: holds scores made with {'; '.join(differences)}. "
                "Give another --out, or --overwrite to replace them"
            )
    for stale in path.rglob(f"*{UNFINISHED}"):
        stale.unlink()


def _differences(
    found: Mapping[str, Any], asked: Mapping[str, Any]
) -> Iterator[tuple[str, object, object]]:
    if found.get("head", {}).get("sha256") != asked["head"]["sha256"]:
        yield "head", found.get("head", {}).get("name"), asked["head"]["name"]
    for key in ("schema_version", "source", "format", "columns", "stages"):
        if found.get(key) != asked.get(key):
            yield key.replace("_", " "), found.get(key), asked.get(key)
    for key in ("encoder", "preprocessing"):
        there, wanted = found.get(key) or {}, asked.get(key) or {}
        for name in sorted({*there, *wanted}):
            if there.get(name) != wanted.get(name):
                yield f"{key} {name}", there.get(name), wanted.get(name)


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_run_file(path: Path) -> dict[str, Any] | None:
    """``_run.json`` of a scores folder, or None where there is none."""
    try:
        found: dict[str, Any] = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path / RUN_FILE}: cannot be read ({error})") from None
    return found


def scores_around(path: Path) -> bool:
    """Whether a folder is, or lies in, a scores folder: all Parquet files there are its parts."""
    path = path.resolve()
    return any((folder / RUN_FILE).exists() for folder in (path, *path.parents))


def list_parts(path: Path) -> list[Path]:
    """The finished parts in a scores folder, in the order of the source's shards."""
    names = [part.relative_to(path).as_posix() for part in path.rglob("*.parquet")]
    names.sort(key=lambda name: natural_order(name.removesuffix(".parquet")))
    return [path / name for name in names]


def read_part(path: Path) -> Part | None:
    """What a part says of itself; None where it is missing, foreign or damaged."""
    try:
        with pq.ParquetFile(path.absolute()) as file:
            metadata = file.metadata.metadata or {}
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None
    if METADATA_KEY not in metadata or COUNTS_KEY not in metadata:
        return None
    provenance = json.loads(metadata[METADATA_KEY])
    counts = json.loads(metadata[COUNTS_KEY])
    cut = counts.pop("cut", "")
    return Part(path, provenance["shard"], provenance["shard_version"], counts, cut)


def _with_columns_of(schema: pa.Schema, table: pa.Table) -> pa.Schema:
    """A schema that holds the table too: with its columns, of types as wide as it needs."""
    fields = list(schema)
    places = {field.name: place for place, field in enumerate(fields)}
    for field in table.schema:
        place = places.get(field.name)
        if place is None:
            fields.append(field)
        elif fields[place].type != field.type:
            fields[place] = _unified(fields[place], field)
    return pa.schema(fields, schema.metadata)


def _unified(one: pa.Field, other: pa.Field) -> pa.Field:
    kinds = [one.type, other.type]
    if sum(map(pa.types.is_dictionary, kinds)) == 1:
        kinds = [k.value_type if pa.types.is_dictionary(k) else k for k in kinds]
    schemas = [pa.schema([pa.field(one.name, kind)]) for kind in kinds]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except pa.ArrowException:
        raise StageError(
            f"the column {one.name!r} is {one.type} in some tables and {other.type} in others; "
            "the stage that adds it has to give it one type"
        ) from None


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The same rows with all columns of the schema: nulls where they had none."""
    if table.schema.equals(schema):
        return table
    columns = [
        _cast(table.column(field.name), field)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema.names)


def _cast(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    if column.type == field.type:
        return column
    try:
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise StageError(
            f"the column {field.name!r} is {column.type} in some tables and {field.type} in "
            f"others, and cannot be both ({error}); the stage that adds it has to give it one type"
        ) from None


def _group_rows(schema: pa.Schema) -> int:
    """Rows in a row group: about as many bytes whether there are embeddings or not."""
    return EMBEDDED_GROUP_ROWS if EMBEDDING in schema.names else GROUP_ROWS


def _read_back(paths: Iterable[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    for path in paths:
        with pq.ParquetFile(path.absolute()) as file:
            for group in range(file.num_row_groups):
                yield _fit(file.read_row_group(group), schema)


def local_folder(path: str | os.PathLike[str]) -> Path:
    """An output folder's path.

    Raises:
        OutputError: it is a URI; results are written on this machine.
    """
    text = os.fspath(path)
    if "://" in text:
        raise OutputError(f"{text}: results are written to a local folder; copy them there after")
    return Path(text).expanduser()


def unwritable(path: Path, error: OSError) -> AestheticFilterError:
    """The one message for a disk that is full or fails while a run is writing."""
    return AestheticFilterError(
        f"{path}: cannot be written: {error.strerror or error}. "
        "The finished parts are whole; make room, then run the same again"
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def provenance(
    head: Head,
    source: str,
    format_name: str,
    columns: Mapping[str, Any],
    made_from: Mapping[str, Any] | None = None,
    stages: Sequence[str] = (),
) -> dict[str, Any]:
    """What makes a run what it is, as it stands in ``_run.json`` and in every part.

    ``made_from`` says of scores that began with images where these are ("images"), and how they
    were embedded ("encoder", "preprocessing"). ``stages`` are a pipeline's own, by what they call
    themselves.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "package": f"aesthetic-filter {version('aesthetic-filter')}",
        "head": {"name": head.name, "sha256": head.sha256, **head.provenance},
        "space": head.space,
        "source": source,
        "format": format_name,
        "columns": dict(columns),
        **(made_from or {}),
        **({"stages": list(stages)} if stages else {}),
    }
