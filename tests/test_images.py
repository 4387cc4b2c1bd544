"""Images end to end: what every kind of source gives, what fails and why, what is written out."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import aesthetic_filter as af
from aesthetic_filter import cli as commands
from aesthetic_filter.clip import preprocess
from images import (
    EXACT,
    WITHIN,
    Oracle,
    affine,
    by_id,
    encoded,
    jpeg,
    members,
    picture,
    pictures,
    rows,
    run_measured,
    run_python,
    run_without,
    sha256,
    tar_bytes,
    turned,
    write_files,
    write_table,
    write_tar,
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(scope="module")
def collection() -> Files:
    """Pictures of all sorts, real photographs among them where they are on this machine."""
    found = dict(pictures())
    golden = Path(__file__).resolve().parents[2] / "shared" / "golden"
    for name in ("cat.jpg", "random_image.jpg"):
        if (golden / name).exists():
            found[f"real/{name}"] = (golden / name).read_bytes()
    return found


@pytest.fixture(scope="module")
def expected(oracle: Oracle, collection: Files) -> dict[str, np.ndarray]:
    return dict(zip(collection, oracle.embed(list(collection.values())), strict=True))


@pytest.fixture(autouse=True)
def weights(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", str(model_dir))


def run(*arguments: object) -> Result:
    """The command line, in this process."""
    done = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def refused(done: Any, *words: str, lines: int = 2) -> None:
    """A line or two on standard error, nothing on standard output, exit code 2."""
    code = done.exit_code if isinstance(done, Result) else done.returncode
    assert code == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= lines, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every image that is decoded, in this process."""
    seen: list[Any] = []
    real = preprocess.preprocess

    def counted(image: Any, *more: Any) -> Any:
        seen.append(image)
        return real(image, *more)

    monkeypatch.setattr(preprocess, "preprocess", counted)
    return seen


# Every kind of source gives the same.


def key(name: str) -> str:
    """A name as a WebDataset key: no dot but the extension's."""
    return name.rpartition(".")[0]


def as_folder(place: Path, files: Files) -> tuple[Path, dict[str, str]]:
    return write_files(place / "in", files), {name: name for name in files}


def as_glob(place: Path, files: Files) -> tuple[str, dict[str, str]]:
    write_files(place / "in", {**files, "b/x.txt": b"no image"})
    ids = {n: n.removeprefix("b/deep/") for n in files if n.startswith("b/deep/")}
    return f"{place}/in/b/deep/*", ids


def as_one_file(place: Path, files: Files) -> tuple[Path, dict[str, str]]:
    write_files(place / "in", files)
    return place / "in/a/wide.jpg", {"a/wide.jpg": "wide.jpg"}


def as_tars(ending: str, braces: str = "") -> Callable[[Path, Files], tuple[Any, dict[str, str]]]:
    """Two folders with shards of the same name."""

    def make(place: Path, files: Files) -> tuple[Any, dict[str, str]]:
        names = list(files)
        ids = {}
        for shard, some in (("x/00000", names[::2]), ("y/00000", names[1::2])):
            write_tar(place / "in" / f"{shard}{ending}", [(name, files[name]) for name in some])
            ids |= {name: f"{shard}{ending}/{key(name)}" for name in some}
        return (f"{place}/in/{braces}" if braces else place / "in"), ids

    return make


def as_bytes(place: Path, files: Files) -> tuple[Path, dict[str, str]]:
    columns = {"uid": [f"u{n}" for n in range(len(files))], "jpg": list(files.values())}
    write_table(place / "in/t.parquet", columns)
    return place / "in", {name: f"u{n}" for n, name in enumerate(files)}


def as_struct(place: Path, files: Files) -> tuple[Path, dict[str, str]]:
    cells = [{"bytes": content, "path": name} for name, content in files.items()]
    write_table(place / "in/t.parquet", {"image": cells})
    return place / "in", {name: f"t.parquet/{name}" for name in files}


def as_paths(place: Path, files: Files) -> tuple[Path, dict[str, str]]:
    write_files(place / "in/files", files)
    write_table(place / "in/t.parquet", {"image_path": [f"files/{name}" for name in files]})
    return place / "in/t.parquet", {name: f"files/{name}" for name in files}


SOURCES: dict[str, Callable[[Path, Files], tuple[Any, dict[str, str]]]] = {
    "folder": as_folder,
    "glob": as_glob,
    "file": as_one_file,
    "tar": as_tars(".tar"),
    "tar.gz": as_tars(".tar.gz"),
    "tar.zst": as_tars(".tar.zst"),
    "braces": as_tars(".tar", "{x,y}/00000.tar"),
    "bytes": as_bytes,
    "struct": as_struct,
    "paths": as_paths,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same(
    kind: str, tmp_path: Path, collection: Files, expected: dict[str, np.ndarray]
) -> None:
    source, ids = SOURCES[kind](tmp_path, collection)
    af.score(source, tmp_path / "s", images=EXACT)
    found = by_id(tmp_path / "s")
    assert set(found) == set(ids.values())
    for name, image_id in ids.items():
        row = found[image_id]
        assert row["error"] is None
        vector = np.array(row["embedding"], np.float64)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)
        assert vector @ expected[name] / np.linalg.norm(vector) > 0.9999999
        assert np.abs(vector - expected[name]).max() < 5e-4
        score = affine(expected[name][None])[0]
        assert row["aesthetic_score"] == pytest.approx(score, abs=WITHIN)
        # The stored embedding is the one that was scored.
        assert row["aesthetic_score"] == pytest.approx(affine(vector[None])[0], abs=2e-5)
        assert row["image_sha256"] == sha256(collection[name])
        with Image.open(io.BytesIO(collection[name])) as image:
            size = image.size if name != "turned.jpg" else image.size[::-1]
        assert (row["width"], row["height"]) == size


def test_the_command_line_does_it_all(
    tmp_path: Path, cli: Run, collection: Files, expected: dict[str, np.ndarray]
) -> None:
    write_files(tmp_path / "photos", {**collection, "notes.txt": b"no image", "x.jpg": b"broken"})
    done = cli("score", "photos", "--out", "scores", "--precision", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    words = " ".join(done.stdout.split())
    assert f"scored {len(collection)} failed 1" in words
    schema = pq.read_schema(tmp_path / "scores/images-00000.parquet")
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "image_id": pa.string(),
        "aesthetic_score": pa.float32(),
        "error": pa.string(),
        "embedding_norm": pa.float32(),
        "reference_cosine": pa.float32(),
        "image_path": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "image_sha256": pa.string(),
        "embedding": pa.list_(pa.float16(), 768),
    }
    found = by_id(tmp_path / "scores")
    for name, vector in expected.items():
        assert found[name]["image_path"] == str(tmp_path / "photos" / name)
        assert found[name]["aesthetic_score"] == pytest.approx(affine(vector[None])[0], abs=WITHIN)
    assert found["x.jpg"]["error"] == "not an image that can be decoded"
    stamp = json.loads((tmp_path / "scores/_run.json").read_text())
    assert stamp["status"] == "complete"
    assert stamp["images"]["source"] == str(tmp_path / "photos")
    assert stamp["encoder"]["name"] == "openai/clip-vit-large-patch14"
    assert stamp["encoder"]["precision"] == "float32"
    assert stamp["preprocessing"]["decode"] == "exact"


def test_a_photograph_is_turned_upright_unless_that_is_unwanted(
    tmp_path: Path, oracle: Oracle
) -> None:
    files = {f"{n}.jpg": turned(n, 300, 200, n) for n in (1, 3, 6, 8)}
    write_files(tmp_path / "in", files)
    assert run("score", tmp_path / "in", "-o", tmp_path / "up", "-q").exit_code == 0
    done = run("score", tmp_path / "in", "-o", tmp_path / "raw", "-q", "--ignore-exif")
    assert done.exit_code == 0
    up, raw = by_id(tmp_path / "up"), by_id(tmp_path / "raw")
    for exif, found in ((True, up), (False, raw)):
        wanted = oracle.embed(list(files.values()), exif=exif)
        for vector, (name, row) in zip(wanted, sorted(found.items()), strict=True):
            flipped = exif and name in ("6.jpg", "8.jpg")
            assert (row["width"], row["height"]) == ((200, 300) if flipped else (300, 200))
            # In the precision of its own choosing, which is another from machine to machine.
            assert np.array(row["embedding"]) @ vector > 0.9995


def test_sidecars_are_columns(tmp_path: Path) -> None:
    samples = []
    for number in range(12):
        samples += [
            (f"{number}.jpg", jpeg(number)),
            (f"{number}.txt", f"caption {number}".encode()),
            (f"{number}.json", json.dumps({"n": number}).encode()),
            (f"{number}.cls", str(number % 3).encode()),
        ]
    write_tar(tmp_path / "in/0.tar", samples)
    assert run("score", tmp_path / "in", "-o", tmp_path / "s", "-q").exit_code == 0
    found = by_id(tmp_path / "s")
    for number in range(12):
        row = found[f"0.tar/{number}"]
        assert row["txt"] == f"caption {number}"
        assert json.loads(row["json"]) == {"n": number}
        assert row["cls"] == str(number % 3)

    where = "json_extract(json, '$.n')::int >= 6 and txt like 'caption%'"
    done = run("filter", tmp_path / "s", "-o", tmp_path / "k", "--where", where)
    assert done.exit_code == 0, done.stderr
    assert {row["image_id"] for row in rows(tmp_path / "k")} == {f"0.tar/{n}" for n in range(6, 12)}
    done = run("filter", tmp_path / "s", "-o", tmp_path / "k", "--top", 2, "--per", "cls")
    assert done.exit_code == 0, done.stderr
    kept = {row["image_id"] for row in rows(tmp_path / "k")}
    best = set()
    for group in "012":
        ranked = sorted(
            (row for row in found.values() if row["cls"] == group),
            key=lambda row: -row["aesthetic_score"],
        )
        best |= {row["image_id"] for row in ranked[:2]}
    assert kept == best


def test_a_column_that_comes_late(tmp_path: Path) -> None:
    samples = []
    for number in range(150):
        samples.append((f"{number:03}.jpg", jpeg(number % 9)))
        if number > 100:
            samples.append((f"{number:03}.txt", str(number).encode()))
    write_tar(tmp_path / "in/0.tar", samples)
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    found = rows(tmp_path / "s")
    assert [row["txt"] for row in found] == [None] * 101 + [str(n) for n in range(101, 150)]
    assert [row["image_sha256"] for row in found] == [sha256(jpeg(n % 9)) for n in range(150)]
    vectors = np.array([row["embedding"] for row in found], np.float16)
    scores = [row["aesthetic_score"] for row in found]
    assert np.abs(affine(vectors) - scores).max() < 2e-5


def test_columns_are_chosen(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", [("a.jpg", jpeg(0)), ("a.txt", b"t"), ("a.cls", b"1")])
    assert run("score", tmp_path / "in", "-o", tmp_path / "s", "--columns", "cls").exit_code == 0
    (row,) = rows(tmp_path / "s")
    assert row["cls"] == "1"
    assert "txt" not in row


def test_photographs_named_by_cameras_are_rows(tmp_path: Path) -> None:
    """Of Adobe RGB pictures Nikon's names begin with ``_DSC``, Canon's with ``_MG_``."""
    files = {"_DSC0001.JPG": jpeg(1), "_MG_0002.JPG": jpeg(2), "_trip/a.jpg": jpeg(3)}
    write_files(tmp_path / "in", {**files, "b.jpg": jpeg(4)})
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    assert set(by_id(tmp_path / "s")) == {*files, "b.jpg"}


# Every image is accounted for.


def test_what_cannot_be_scored_fails_alone_with_a_reason(tmp_path: Path) -> None:
    whole = encoded(picture(1, 300, 300), "JPEG", quality=95)
    good = {f"good{n}.jpg": jpeg(n) for n in range(3)}
    bad = {
        "broken.jpg": b"\xff\xd8\xff\xe0" + b"\0" * 50,
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<html>404 not found</html>",
        "text.png": b"just text",
        "cut.png": encoded(picture(2, 300, 300), "PNG")[:3000],
    }
    files = {**good, **bad}
    write_files(tmp_path / "folder", files)
    write_tar(
        tmp_path / "tar/0.tar", [(f"{n}/{name}", c) for n, (name, c) in enumerate(files.items())]
    )
    write_table(tmp_path / "table/0.parquet", {"image": [None, *files.values(), None]})
    truncated = "image is truncated (--allow-truncated scores what is there)"
    reasons = {
        "cut.jpg": truncated,
        "cut.png": truncated,
        "empty.jpg": "image is empty (0 bytes)",
        "page.jpg": "not an image that can be decoded",
        "text.png": "not an image that can be decoded",
    }
    scores = []
    for kind, nulls in (("folder", 0), ("tar", 0), ("table", 2)):
        out = tmp_path / f"s-{kind}"
        assert (
            run("score", tmp_path / kind, "-o", out, "-q", "--precision", "float32").exit_code == 0
        )
        found = {row["image_sha256"]: row for row in rows(out)}
        told = {sha: row["aesthetic_score"] for sha, row in found.items() if sha}
        assert set(told) == {sha256(content) for content in good.values()}
        scores.append(told)
        failed = [row for row in rows(out) if row["error"] is not None]
        assert len(failed) == len(bad) + nulls
        assert sum(row["error"] == "image is null" for row in failed) == nulls
        for row in failed:
            for name in ("aesthetic_score", "embedding", "width", "height", "embedding_norm"):
                assert row[name] is None
        if kind == "folder":
            named = by_id(out)
            assert {name: named[name]["error"] for name in reasons} == reasons
            assert named["broken.jpg"]["error"]
        facts = json.loads((out / "_run.json").read_text())
        assert facts["rows"] == facts["scored"] + facts["failed"] == len(files) + nulls
        assert facts["failed"] == len(bad) + nulls
        shown = " ".join(run("summary", out).stdout.split())
        assert f"{truncated} 2" in shown
        assert "not an image that can be decoded 3" in shown
    assert scores[0] == scores[1] == scores[2]


def test_what_is_there_of_a_truncated_image(tmp_path: Path) -> None:
    whole = encoded(picture(1, 300, 300), "JPEG", quality=95)
    write_files(tmp_path / "in", {"a.jpg": whole, "cut.jpg": whole[: len(whole) * 2 // 3]})
    done = run("score", tmp_path / "in", "-o", tmp_path / "s", "-q", "--allow-truncated")
    assert done.exit_code == 0
    found = by_id(tmp_path / "s")
    assert found["cut.jpg"]["error"] is None
    assert (found["cut.jpg"]["width"], found["cut.jpg"]["height"]) == (300, 300)
    a, b = (np.array(found[name]["embedding"], float) for name in ("a.jpg", "cut.jpg"))
    assert 0.3 < a @ b < 0.9999  # part of it is the same


def test_images_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    files = {"at.png": encoded(picture(1, 100, 100), "PNG")}
    files["over.png"] = encoded(picture(1, 101, 100), "PNG")
    write_files(tmp_path / "in", files)
    done = run("score", tmp_path / "in", "-o", tmp_path / "s", "-q", "--max-pixels", 10_000)
    assert done.exit_code == 0
    found = by_id(tmp_path / "s")
    assert found["at.png"]["error"] is None
    assert found["over.png"]["error"] == "image has more than 10,000 pixels (--max-pixels)"


# Another head over the same embeddings.


def test_another_head_embeds_nothing(tmp_path: Path, collection: Files) -> None:
    write_files(tmp_path / "in", {**collection, "bad.jpg": b"broken"})
    write_tar(tmp_path / "tars/a/0.tar", [("x.jpg", jpeg(1)), ("x.txt", b"hello")])
    for source in ("in", "tars"):
        first, second, direct = (tmp_path / f"{source}-{n}" for n in ("1", "2", "direct"))
        af.score(tmp_path / source, first, images=EXACT)
        af.score(tmp_path / source, direct, images=EXACT, head="laion-v1")
        done = run_without(
            ["torch", "PIL"], "score", first, "--head", "laion-v1", "-o", second, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        wanted = by_id(direct)
        for row in wanted.values():
            del row["embedding"]
        assert by_id(second) == wanted
        for image_id, row in by_id(first).items():
            if row["embedding"]:
                score = affine(np.array([row["embedding"]]), "laion-v1")[0]
                assert wanted[image_id]["aesthetic_score"] == pytest.approx(score, abs=2e-5)
        assert [p.name for p in sorted(first.rglob("*.parquet"))] == [
            p.name for p in sorted(second.rglob("*.parquet"))
        ]
    assert wanted["a/0.tar/x"]["txt"] == "hello"
    assert by_id(tmp_path / "in-2")["bad.jpg"]["error"] == "not an image that can be decoded"


def test_scores_without_embeddings_are_no_source(
    tmp_path: Path, make_embeddings: Callable[..., np.ndarray]
) -> None:
    (tmp_path / "e").mkdir()
    np.save(tmp_path / "e/a.npy", make_embeddings(10))
    af.score(tmp_path / "e", tmp_path / "s")
    done = run("score", tmp_path / "s", "-o", tmp_path / "s2", "--head", "laion-v1")
    refused(done, "hold no embeddings", "score what they were made from instead", "e")
    assert not (tmp_path / "s2").exists()

    write_files(tmp_path / "in", {"a.jpg": jpeg(1)})
    af.score(tmp_path / "in", tmp_path / "i", images=EXACT)
    af.score(tmp_path / "i", tmp_path / "i2", head="laion-v1")
    done = run("score", tmp_path / "i2", "-o", tmp_path / "i3")
    refused(done, "hold no embeddings", str(tmp_path / "i"))


# Images again.


def photos(place: Path) -> tuple[Path, Files]:
    files = {f"{'xy'[n % 2]}/p{n:02}.jpg": jpeg(n) for n in range(10)} | {"bad.jpg": b"broken"}
    return write_files(place / "photos", files), files


def tars(place: Path) -> tuple[Path, Files]:
    files = {}
    for shard in range(2):
        samples = []
        for n in range(5):
            content = jpeg(100 * shard + n)
            files[f"{shard}.tar/s{n}"] = content
            samples += [
                (f"s{n}.jpg", content),
                (f"s{n}.txt", f"text {shard} {n}".encode()),
                (f"s{n}.pkl", bytes([shard, n])),
            ]
        write_tar(place / f"tars/{shard}.tar", [*samples, ("bad.jpg", b"broken")])
    return place / "tars", files


def table(place: Path) -> tuple[Path, Files]:
    files = {f"d/i{n}.jpg": jpeg(200 + n) for n in range(10)}
    cells = [{"bytes": c, "path": n} for n, c in files.items()]
    columns = {"image": [*cells, None], "caption": [f"c{n}" for n in range(11)]}
    write_table(place / "table/t.parquet", columns)
    return place / "table", files


def listed(place: Path) -> tuple[Path, Files]:
    files = {f"files/i{n}.jpg": jpeg(300 + n) for n in range(10)}
    write_files(place / "listed", files)
    write_table(place / "listed/t.parquet", {"image_path": [*files, "files/gone.jpg"]})
    return place / "listed/t.parquet", files


KINDS = {"photos": photos, "tars": tars, "table": table, "listed": listed}


def written(out: Path, as_: str) -> dict[str, bytes]:
    """The images in what was written: name to bytes, read with nothing of ours."""
    if as_ == "folder":
        files = [p for p in out.rglob("*") if p.suffix == ".jpg"]
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}
    if as_ == "webdataset":
        found = {}
        for path in sorted(out.glob("*.tar")):
            for name, content in members(path).items():
                if name.endswith(".jpg"):
                    found[f"{path.name}/{name}"] = content
        return found
    tables = [pq.read_table(p).to_pylist() for p in sorted(out.glob("kept-*.parquet"))]
    cells = [row["image"] for some in tables for row in some]
    return {f"{n}:{cell['path']}": cell["bytes"] for n, cell in enumerate(cells)}


INDEX = {"folder": "_index.parquet", "webdataset": "0*.parquet", "parquet": "kept-*.parquet"}


@pytest.mark.parametrize("as_", ["webdataset", "folder", "parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_written_as_it_was(kind: str, as_: str, tmp_path: Path) -> None:
    source, files = KINDS[kind](tmp_path)
    scores, out = tmp_path / "s", tmp_path / "out"
    af.score(source, scores, images=EXACT)
    if kind in ("photos", "tars"):  # and from scores of those scores
        af.score(scores, tmp_path / "s2", head="laion-v1")
        scores = tmp_path / "s2"
    ranked = sorted(
        (row for row in rows(scores) if row["error"] is None),
        key=lambda row: (-row["aesthetic_score"], row["image_id"]),
    )
    best = {row["image_sha256"]: row for row in ranked[:4]}
    size = ("--shard-size", 3) if as_ != "folder" else ()
    done = run("filter", scores, "-o", out, "--top", 4, "--as", as_, *size)
    assert done.exit_code == 0, done.stderr
    images = written(out, as_)
    hashes = {name: sha256(content) for name, content in images.items()}
    assert set(hashes.values()) == set(best)
    assert len(images) == 4
    assert set(images.values()) <= set(files.values())

    index = [r for p in sorted(out.glob(INDEX[as_])) for r in pq.read_table(p).to_pylist()]
    assert len(index) == 4
    assert "embedding" not in index[0]
    for row in index:
        wanted = best[row["image_sha256"]]
        assert row["aesthetic_score"] == wanted["aesthetic_score"]
        assert row["image_id"] == wanted["image_id"]
        if as_ == "folder":
            assert hashes[row["file"]] == row["image_sha256"]
        if as_ == "webdataset":
            assert hashes[f"{row['shard']}/{row['member']}"] == row["image_sha256"]
        if as_ == "parquet":
            assert sha256(row["image"]["bytes"]) == row["image_sha256"]
    if as_ == "webdataset":
        assert [p.name for p in sorted(out.glob("*.tar"))] == ["00000.tar", "00001.tar"]
    if as_ == "parquet":
        assert len(list(out.glob("kept-*.parquet"))) == 2
    if kind == "photos" and as_ == "folder":
        assert set(images) == {row["image_id"] for row in best.values()}

    if kind == "tars":  # sidecars come with their images
        for sha, row in best.items():
            shard, number = re.fullmatch(r"(\d)\.tar/s(\d)", row["image_id"]).groups()
            text, blob = f"text {shard} {number}".encode(), bytes([int(shard), int(number)])
            place = next(name for name, its in hashes.items() if its == sha)
            if as_ == "folder":
                assert place == f"{shard}/s{number}.jpg"
                assert (out / place).with_suffix(".txt").read_bytes() == text
                assert (out / place).with_suffix(".pkl").read_bytes() == blob
            if as_ == "webdataset":
                tar, _, name = place.partition("/")
                inside = members(out / tar)
                assert inside[name.replace(".jpg", ".txt")] == text
                assert inside[name.replace(".jpg", ".pkl")] == blob
            if as_ == "parquet":
                row = next(r for r in index if r["image_sha256"] == sha)
                beside = {its["extension"]: its["bytes"] for its in row["sidecars"]}
                assert beside == {"txt": text, "pkl": blob}

    # It is a source again.
    af.score(out, tmp_path / "again", images=EXACT)
    again = rows(tmp_path / "again")
    first = {row["image_sha256"]: row["aesthetic_score"] for row in rows(tmp_path / "s")}
    assert {row["image_sha256"]: row["aesthetic_score"] for row in again} == {
        sha: first[sha] for sha in best
    }
    where = {row["image_path"] for row in again}
    assert all(path.startswith(str(out)) for path in where), where


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path, Files]:
    """Photographs, their scores, and the files."""
    place = tmp_path_factory.mktemp("scored")
    source, files = photos(place)
    af.score(source, place / "s", images=EXACT, model_dir=model_dir)
    return source, place / "s", files


def threshold(scores: Path, keep: int) -> float:
    """A score that so many are above."""
    found = sorted((r["aesthetic_score"] for r in rows(scores) if r["error"] is None), reverse=True)
    return (found[keep - 1] + found[keep]) / 2


def above(scores: Path, score: float) -> set[str]:
    return {r["image_id"] for r in rows(scores) if (r["aesthetic_score"] or -99) >= score}


def test_the_score_goes_into_each_json(tmp_path: Path) -> None:
    samples = [("a.jpg", jpeg(1)), ("a.json", b'{"x": 1}'), ("b.jpg", jpeg(2))]
    write_tar(tmp_path / "in/0.tar", samples)
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    out = tmp_path / "out"
    options = ("--as", "webdataset", "--score-in", "json")
    assert run("filter", tmp_path / "s", "-o", out, "--top", 2, *options).exit_code == 0
    inside = members(out / "00000.tar")
    found = {row["image_id"]: row["aesthetic_score"] for row in rows(tmp_path / "s")}
    a, b = json.loads(inside["a.json"]), json.loads(inside["b.json"])
    assert a == {"x": 1, "aesthetic_score": pytest.approx(found["0.tar/a"])}
    assert b == {"aesthetic_score": pytest.approx(found["0.tar/b"])}


@pytest.mark.parametrize("link", ["hard", "symlink"])
def test_links(link: str, tmp_path: Path, scored: tuple[Path, Path, Files]) -> None:
    source, scores, _ = scored
    out = tmp_path / "out"
    done = run("filter", scores, "-o", out, "--top", 3, "--as", "folder", "--link", link)
    assert done.exit_code == 0, done.stderr
    images = written(out, "folder")
    assert len(images) == 3
    for name in images:
        assert (out / name).samefile(source / name)
        assert (out / name).is_symlink() == (link == "symlink")


@pytest.mark.parametrize("as_", ["folder", "webdataset", "parquet"])
def test_another_threshold_leaves_nothing_stale(
    as_: str, tmp_path: Path, scored: tuple[Path, Path, Files]
) -> None:
    _, scores, files = scored
    out = tmp_path / "out"
    size = ("--shard-size", 2) if as_ != "folder" else ()
    for keep in (3, 9, 2, 5):
        score = threshold(scores, keep)
        done = run("filter", scores, "-o", out, "--min-score", score, "--as", as_, *size)
        assert done.exit_code == 0, done.stderr
        wanted = above(scores, score)
        assert len(wanted) == keep
        kept = sorted(sha256(content) for content in written(out, as_).values())
        assert kept == sorted(sha256(files[name]) for name in wanted)
        index = [row for path in out.glob(INDEX[as_]) for row in pq.read_table(path).to_pylist()]
        assert {row["image_id"] for row in index} == wanted
        described = json.loads((out / "_selection.json").read_text())
        assert described["counts"]["kept"] == keep
        (out / "x").mkdir(exist_ok=True)
        (out / "mine.txt").write_text("a stranger's")
        (out / "x/mine.txt").write_text("a stranger's")
    assert (out / "mine.txt").read_text() == "a stranger's"
    assert (out / "x/mine.txt").read_text() == "a stranger's"
    ours = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    listed = [json.loads(line) for line in (out / "_files.jsonl").read_text().splitlines()]
    own = {"_files.jsonl", "_selection.json", "mine.txt", "x/mine.txt"}
    assert set(listed) == ours - own


def test_a_strangers_file_under_a_kept_name_is_not_overwritten(
    tmp_path: Path, scored: tuple[Path, Path, Files]
) -> None:
    _, scores, files = scored
    out = tmp_path / "out"
    few, more = threshold(scores, 2), threshold(scores, 6)
    assert run("filter", scores, "-o", out, "--min-score", few, "--as", "folder").exit_code == 0
    name = sorted(above(scores, more) - above(scores, few))[0]
    write_files(out, {name: b"a stranger's"})
    done = run("filter", scores, "-o", out, "--min-score", more, "--as", "folder")
    assert (out / name).read_bytes() == b"a stranger's"
    if done.exit_code == 0:  # then it has found another name
        kept = {sha256(content) for content in written(out, "folder").values()}
        assert {sha256(files[name]) for name in above(scores, more)} <= kept


@pytest.mark.parametrize("as_", ["folder", "webdataset", "parquet"])
def test_an_error_half_way_leaves_what_was_there(
    as_: str, tmp_path: Path, scored: tuple[Path, Path, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, scores, files = scored
    out = tmp_path / "out"
    first = threshold(scores, 2)
    assert run("filter", scores, "-o", out, "--min-score", first, "--as", as_).exit_code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    from aesthetic_filter.selection import engine

    real = engine.kept_images

    def broken(*arguments: Any) -> Any:
        for number, row in enumerate(real(*arguments)):
            if number == 3:
                raise OSError(28, "No space left on device")
            yield row

    monkeypatch.setattr(engine, "kept_images", broken)
    second = threshold(scores, 6)
    done = run("filter", scores, "-o", out, "--min-score", second, "--as", as_)
    refused(done, "No space left on device", lines=1)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    assert run("filter", scores, "-o", out, "--min-score", second, "--as", as_).exit_code == 0
    kept = {sha256(content) for content in written(out, as_).values()}
    assert kept == {sha256(files[name]) for name in above(scores, second)}


def test_killed_while_it_swaps_and_run_again(
    tmp_path: Path, scored: tuple[Path, Path, Files]
) -> None:
    """``kill -9`` in the worst moment: some files are the new ones, some still the old."""
    _, scores, files = scored
    out = tmp_path / "out"
    first, second = threshold(scores, 6), threshold(scores, 3)
    code = """
import os, signal, sys
from pathlib import Path
import aesthetic_filter as af
from aesthetic_filter.selection import output

real, moves = Path.replace, 0
def replace(self, target):
    global moves
    moves += "/.new/" in str(self)
    if moves == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)

Path.replace = replace
af.open_scores(sys.argv[1]).select(min_score=float(sys.argv[3])).write(sys.argv[2], as_="folder")
"""
    for moment in (1, 3):
        shutil.rmtree(out, ignore_errors=True)
        assert run("filter", scores, "-o", out, "--min-score", first, "--as", "folder", "-q")
        killed = run_python(code, scores, out, second, moment, cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        done = run("filter", scores, "-o", out, "--min-score", second, "--as", "folder")
        assert done.exit_code == 0, done.stderr
        images = written(out, "folder")
        assert images == {name: files[name] for name in above(scores, second)}
        assert not (out / ".new").exists()


def test_names_in_an_archive_cannot_leave_the_folder(tmp_path: Path) -> None:
    names = ["../../up.jpg", "/abs.jpg", "a/../../b.jpg", "c\\..\\..\\d.jpg", "ok.jpg"]
    path = write_tar(tmp_path / "in/0.tar", [(n, jpeg(i)) for i, n in enumerate(names)])
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    reasons = [row["error"] for row in rows(tmp_path / "s")]
    assert reasons == [None] * 5 + ["is a link within the archive, not an image"] * 2
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    for as_ in ("folder", "webdataset", "parquet"):
        out = tmp_path / f"deep/er/{as_}"
        assert run("filter", tmp_path / "s", "-o", out, "--top", 9, "--as", as_).exit_code == 0
        kept = written(out, as_)
        assert {sha256(c) for c in kept.values()} == {sha256(jpeg(n)) for n in range(5)}
        if as_ == "webdataset":
            for tar in out.glob("*.tar"):
                for name in members(tar):
                    assert not name.startswith("/")
                    assert not {"..", "."} & set(re.split(r"[/\\\\]", name))
    after = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert all((tmp_path / "deep/er") in p.parents for p in after - before)
    assert not Path("/abs.jpg").exists()


@pytest.mark.parametrize(
    "how",
    [
        ("webdataset",),
        ("parquet",),
        ("folder",),
        ("folder", "--link", "hard"),
        ("folder", "--link", "symlink"),
    ],
)
def test_an_image_that_changed_is_not_written(how: tuple[str, ...], tmp_path: Path) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(5)}
    source = write_files(tmp_path / "in", files)
    af.score(source, tmp_path / "s", images=EXACT)
    (source / "3.jpg").write_bytes(jpeg(77))
    done = run("filter", tmp_path / "s", "-o", tmp_path / "out", "--top", 5, "--as", *how)
    assert done.exit_code == 1, done.stdout
    assert "3.jpg" in done.stderr
    assert "changed since it was scored" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@pytest.mark.parametrize("options", [(), ("--link", "hard"), ("--link", "symlink")])
def test_an_image_that_was_added_since_is_not_taken_for_another(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(8)}
    source = write_files(tmp_path / "in", files)
    af.score(source, tmp_path / "s", images=EXACT)
    score = threshold(tmp_path / "s", 3)
    write_files(source, {"0a.jpg": jpeg(50)})  # all behind it are a place further down
    command = ("filter", tmp_path / "s", "-o", tmp_path / "out", "--min-score", score)
    done = run(*command, "--as", "folder", *options)
    wanted = {name: files[name] for name in above(tmp_path / "s", score)}
    if done.exit_code == 0:
        assert written(tmp_path / "out", "folder") == wanted
    else:  # to score again is right too, but none of them has changed
        assert "score the source again" in done.stderr
        assert not any(f"{name} has changed" in done.stderr for name in files)
        assert written(tmp_path / "out", "folder") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_moved_or_is_gone(kind: str, tmp_path: Path) -> None:
    source, files = KINDS[kind](tmp_path)
    af.score(source, tmp_path / "s", images=EXACT)
    (tmp_path / "moved").mkdir()
    folder = source if source.is_dir() else source.parent
    folder.rename(tmp_path / "moved/here")
    now = tmp_path / "moved/here"
    now = now if source == folder else now / source.name
    out = tmp_path / "out"
    gone = run("filter", tmp_path / "s", "-o", out, "--top", 2, "--as", "folder")
    assert gone.exit_code in (1, 2)
    assert str(source) in gone.stderr
    assert len(gone.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in gone.stderr
    assert not [p for p in out.rglob("*") if p.is_file()]
    done = run("filter", tmp_path / "s", "-o", out, "--top", 2, "--as", "folder", "--source", now)
    assert done.exit_code == 0, done.stderr
    assert len(written(out, "folder")) == 2
    assert set(written(out, "folder").values()) <= set(files.values())


def test_rows_have_no_embeddings_and_the_dropped_say_why(
    tmp_path: Path, scored: tuple[Path, Path, Files]
) -> None:
    _, scores, _ = scored
    score = threshold(scores, 4)
    best = above(scores, score)
    good = {r["image_id"] for r in rows(scores) if r["error"] is None}
    options = ("--min-score", score, "--with-dropped")
    for as_ in ("index", "csv", "jsonl", "ids", "folder", "webdataset", "parquet"):
        out = tmp_path / as_
        done = run("filter", scores, "-o", out, *options, "--as", as_)
        assert done.exit_code == 0, done.stderr
        for path in out.rglob("*"):
            if path.suffix == ".parquet":
                assert "embedding" not in pq.read_schema(path).names
            elif path.suffix in (".csv", ".jsonl", ".txt") and path.name[0] != "_":
                assert 'embedding"' not in path.read_text().replace(",", '"').splitlines()[0]
    assert set((tmp_path / "ids/kept.txt").read_text().split()) == best
    assert {r["image_id"] for r in rows(tmp_path / "index") if r.get("dropped_by")} == good - best
    for as_, prefix in (("index", ""), ("folder", "_"), ("webdataset", "_"), ("parquet", "_")):
        dropped = pq.read_table(tmp_path / as_ / f"{prefix}dropped.parquet").to_pylist()
        failed = pq.read_table(tmp_path / as_ / f"{prefix}failed.parquet").to_pylist()
        assert {row["image_id"] for row in dropped} == good - best
        assert {row["dropped_by"].split()[0] for row in dropped} == {"min-score"}
        assert [(row["image_id"], row["error"]) for row in failed] == [
            ("bad.jpg", "not an image that can be decoded")
        ]


WRONG = {
    "link webdataset": (("--as", "webdataset", "--link", "hard"), ("--link", "webdataset")),
    "link rows": (("--link", "hard"), ("--link", "index")),
    "link unknown": (("--as", "folder", "--link", "soft"), ("--link", "hard or symlink", "soft")),
    "shard size": (("--as", "folder", "--shard-size", "5"), ("--shard-size", "folder")),
    "score in": (("--as", "folder", "--score-in", "json"), ("--score-in", "folder")),
    "score in what": (("--as", "webdataset", "--score-in", "txt"), ("--score-in", "json", "txt")),
    "as": (("--as", "zip"), ("zip", "webdataset", "folder", "parquet", "csv")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_refused_at_once(
    case: str, tmp_path: Path, scored: tuple[Path, Path, Files], embedded: list[Any]
) -> None:
    source, scores, _ = scored
    options, words = WRONG[case]
    out = tmp_path / "out"
    refused(run("filter", scores, "-o", out, "--top", 2, *options), *words, lines=1)
    assert not out.exists()
    # Of what has not been scored yet: before it is.
    refused(run("filter", source, "-o", out, "--top", 2, *options), *words, lines=1)
    assert embedded == []
    assert list(tmp_path.iterdir()) == []


def test_there_are_no_images_of_embeddings(
    tmp_path: Path, make_embeddings: Callable[..., np.ndarray]
) -> None:
    (tmp_path / "e").mkdir()
    np.save(tmp_path / "e/a.npy", make_embeddings(10))
    af.score(tmp_path / "e", tmp_path / "s")
    for as_ in ("webdataset", "folder"):
        done = run("filter", tmp_path / "s", "-o", tmp_path / "k", "--top", 2, "--as", as_)
        refused(done, "made from embeddings", "index, csv, jsonl or ids", lines=1)
        assert not [p for p in (tmp_path / "k").rglob("*") if p.is_file()]
        done = run("filter", tmp_path / "e", "-o", tmp_path / "k", "--top", 2, "--as", as_)
        refused(done, "embeddings", lines=1)
        assert not (tmp_path / "scores").exists()


# Filter, scoring first.


def test_photographs_are_scored_first_and_once(
    tmp_path: Path, embedded: list[Any], cli: Run
) -> None:
    source, files = photos(tmp_path)
    done = run("filter", source, "-o", tmp_path / "best", "--top", 3, "--as", "folder")
    assert done.exit_code == 0, done.stderr
    assert len(embedded) == len(files)
    found = {row["image_id"]: row for row in rows(tmp_path / "scores")}
    assert set(found) == set(files)
    ranked = sorted(
        (row["aesthetic_score"], name) for name, row in found.items() if not row["error"]
    )
    assert written(tmp_path / "best", "folder") == {n: files[n] for _, n in ranked[-3:]}

    again = run("filter", source, "-o", tmp_path / "best", "--top", 5, "--as", "folder")
    assert again.exit_code == 0, again.stderr
    assert "everything was scored already" in again.stdout
    assert len(embedded) == len(files)
    assert written(tmp_path / "best", "folder") == {n: files[n] for _, n in ranked[-5:]}

    elsewhere = tmp_path / "elsewhere"
    done = cli("filter", "photos", "-o", "b", "--top", "3", "--scores", elsewhere, "--as", "ids")
    assert done.returncode == 0, done.stderr
    assert {row["image_id"] for row in rows(elsewhere)} == set(files)
    kept = (tmp_path / "b/kept.txt").read_text().split()
    assert sorted(kept) == sorted(name for _, name in ranked[-3:])
    refused(
        run("filter", elsewhere, "-o", tmp_path / "c", "--top", 3, "--head", "laion-v1"),
        "is scored already",
    )


def test_what_was_chosen_is_not_chosen_from_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = photos(tmp_path)
    monkeypatch.chdir(source)
    found = []
    for _ in range(3):
        done = run("filter", ".", "-o", "best", "--top", 3, "--as", "folder")
        assert done.exit_code == 0, done.stderr
        found.append(written(source / "best", "folder"))
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("rules", "word"),
    [
        ((), "at least one rule"),
        (("--top", "0"), "--top"),
        (("--top", "-3"), "--top"),
        (("--min-score", "high"), "--min-score"),
        (("--top", "3", "--per"), "--per"),
        (("--where", "width >="), "--where"),
        (("--where", "1; drop table x"), "--where"),
        (("--min-score", "5", "--per", "txt"), "--per"),
    ],
)
def test_rules_that_make_no_sense_are_refused_before_anything_is_embedded(
    rules: tuple[str, ...], word: str, tmp_path: Path, scored: Any, embedded: list[Any]
) -> None:
    done = run("filter", scored[0], "-o", tmp_path / "best", "--as", "folder", *rules)
    assert done.exit_code == 2
    assert word in done.stderr
    assert embedded == []
    assert list(tmp_path.iterdir()) == []


# What the world throws at it.


def test_odd_and_hostile_images_are_all_accounted_for(tmp_path: Path, shared: Path) -> None:
    files = [p for p in sorted((shared / "images").rglob("*")) if p.is_file()]
    named = {p.relative_to(shared / "images").as_posix(): p.read_bytes() for p in files}
    del named["MANIFEST.csv"]
    options = ("--precision", "float32", "--out")
    done, peak = run_measured("score", shared / "images", *options, "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert peak < 2000
    for word in ("Traceback", "Warning", "warning", "Error:"):
        assert word not in done.stderr
    found = by_id(tmp_path / "s")
    assert set(named) == set(found)
    for name, row in found.items():
        assert (row["error"] is None) == (row["aesthetic_score"] is not None), name
        assert row["error"] != ""
        if row["image_sha256"]:
            assert row["image_sha256"] == sha256(named[name])
    facts = json.loads((tmp_path / "s/_run.json").read_text())
    assert facts["rows"] == facts["scored"] + facts["failed"] == len(named)
    assert 140 < facts["scored"] < len(named)

    # The same in an archive: each file a sample of its own.
    inside = [(f"{n:03}.{name.rpartition('.')[2]}", c) for n, (name, c) in enumerate(named.items())]
    write_tar(tmp_path / "in/0.tar", inside)
    assert run("score", tmp_path / "in", *options, tmp_path / "t", "-q").exit_code == 0
    in_tar = by_id(tmp_path / "t")
    assert len(in_tar) == len(named)
    for number, name in enumerate(named):
        row, twin = in_tar[f"0.tar/{number:03}"], found[name]
        if "holds no image" in (row["error"] or ""):
            continue  # in an archive its extension decides what is an image
        assert row["aesthetic_score"] == twin["aesthetic_score"]
        assert row["error"] == twin["error"]


def test_a_tar_cut_in_the_middle_keeps_what_comes_before(
    tmp_path: Path, embedded: list[Any]
) -> None:
    images = [jpeg(n) for n in range(50)]
    whole = tar_bytes((f"{n:02}.jpg", image) for n, image in enumerate(images))
    before = sum(512 + -(-len(image) // 512) * 512 for image in images[:30])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(whole[: before + 512 + 100])
    write_tar(tmp_path / "in/1.tar", [("a.jpg", jpeg(99))])
    for run_number in range(2):
        done = run("score", tmp_path / "in", "-o", tmp_path / "s", "--precision", "float32")
        assert done.exit_code == 3, done.output
        assert "broken shard 0.tar: cut short after 30 samples" in done.stderr
        if run_number == 0:
            assert len(embedded) == 31
        found = by_id(tmp_path / "s")
        assert len(embedded) == 31, "embedded again"
        good = {name for name, row in found.items() if row["error"] is None}
        assert good == {"1.tar/a", *(f"0.tar/{n:02}" for n in range(30))}
        for n in range(30):
            assert found[f"0.tar/{n:02}"]["image_sha256"] == sha256(images[n])
        facts = json.loads((tmp_path / "s/_run.json").read_text())
        assert facts["status"] == "incomplete"
        assert [b["shard"] for b in facts["broken_shards"]] == ["0.tar"]
        assert list((tmp_path / "s").glob("*.embedded")) == []
    # What was there before the cut can be written out.
    done = run("filter", tmp_path / "s", "-o", tmp_path / "k", "--top", 40, "--as", "folder")
    assert done.exit_code == 0
    kept = {sha256(content) for content in written(tmp_path / "k", "folder").values()}
    assert kept == {sha256(image) for image in [*images[:30], jpeg(99)]}
    # Whole again, only the rest is embedded.
    (tmp_path / "in/0.tar").write_bytes(whole)
    assert run("score", tmp_path / "in", "-o", tmp_path / "s", "-q").exit_code == 0
    assert len(embedded) == 31 + 20
    assert len(by_id(tmp_path / "s")) == 51
