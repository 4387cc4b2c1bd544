"""The report: every number worked out anew from the score files, and the page in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

import aesthetic_filter as af
from aesthetic_filter.errors import SelectionError
from aesthetic_filter.report import Options, make_page, report
from aesthetic_filter.scores import open_scores
from browser import SIZES, Watched, as_address, watched
from conftest import Run
from images import EXACT, jpeg, rows, turned, write_files, write_table, write_tar

MARKUP = "<img src=x onerror=alert(1)>"
SCRIPT = "</script><script>alert(2)</script>"
RTL = "ünï \u202egpj.exe"
HOSTILE = (MARKUP, SCRIPT, "\"quoted\" & 'single'", "two\nlines", "../../etc", RTL, "{{ 7 * 7 }}")
MADE_AT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")

Row = dict[str, Any]


# What stands in a page, read with nothing of ours.


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data: dict[str, Any] = json.loads(found)
    return data


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup)).strip()


def section(page: str, name: str) -> str:
    (found,) = re.findall(rf'<section aria-labelledby="h-{name}">(.*?)</section>', page, re.S)
    return str(found)


def tables(markup: str) -> list[list[list[str]]]:
    return [
        [
            [plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)
        ]
        for table in re.findall(r"<table>(.*?)</table>", markup, re.S)
    ]


def facts_of(page: str) -> dict[str, str]:
    found = re.findall(r"<li><b>(.*?)</b><span>(.*?)</span></li>", page)
    return {name: value for value, name in found}


def warnings_of(page: str) -> list[str]:
    return [plain(found) for found in re.findall(r'<p class="warn">(.*?)</p>', page, re.S)]


def commands_of(page: str) -> list[list[str]]:
    (found,) = re.findall(r"<pre>(.*?)</pre>", section(page, "provenance"), re.S)
    return [shlex.split(line) for line in html.unescape(found).splitlines() if line]


def thumbnail(item: Row) -> Image.Image:
    head, _, code = item["image"]["src"].partition(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(code, validate=True)))
    image.load()
    assert image.format == "JPEG"
    assert (image.width, image.height) == (item["image"]["w"], item["image"]["h"])
    return image


def made(scores: Path | af.Scores, **options: Any) -> tuple[str, dict[str, Any], str]:
    """The page, the data in it, and what is missing."""
    opened = open_scores(scores) if isinstance(scores, Path) else scores
    page, problem = make_page(opened, Options(**options))
    return page, data_of(page), problem


class Tags(HTMLParser):
    """All elements of a page as it came, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def alarming(page: str) -> list[str]:
    """Markup that came from a name: what the templates do not have."""
    found = Tags(page)
    more = ["script"] * (found.tags["script"] - 4)  # the data, the charts, and two of our own
    return more + ["img"] * found.tags["img"] + found.handlers


# What should stand there.


def scored(found: Sequence[Row]) -> list[Row]:
    def has(row: Row) -> bool:
        score = row["aesthetic_score"]
        return row.get("error") is None and score is not None and bool(np.isfinite(score))

    return [row for row in found if has(row)]


def values(found: Sequence[Row]) -> NDArray[np.float32]:
    return np.array([row["aesthetic_score"] for row in scored(found)], np.float32)


def at_least(found: Sequence[Row], thresholds: Sequence[float]) -> list[int]:
    """One threshold at a time, compared as float32."""
    some = values(found)
    return [int((some >= np.float32(t)).sum()) for t in thresholds]


def check_numbers(page: str, found: Sequence[Row]) -> dict[str, Any]:
    """Counts, the grid, percentiles and thresholds of the page."""
    data, some = data_of(page), values(found)
    assert (data["rows"], data["scored"]) == (len(found), len(some))
    grid = data["grid"]
    assert grid["rows_from"] == at_least(found, grid["thresholds"])
    assert all(a < b for a, b in pairwise(grid["thresholds"]))
    assert grid["thresholds"][0] <= some.min() + 1e-6
    assert (data["lowest"], data["highest"]) == (some.min(), some.max())
    assert sum(band["rows"] for band in data["bands"]) == len(some)
    facts = facts_of(page)
    assert facts["rows"] == f"{len(found):,}"
    assert facts["scored"] == f"{len(some):,}"
    assert facts["without a score"] == f"{len(found) - len(some):,}"
    assert float(facts["mean score"]) == pytest.approx(some.astype(float).mean(), abs=6e-4)
    assert facts["range"] == f"{some.min():.2f} to {some.max():.2f}"
    percentiles, kept = tables(section(page, "distribution").replace("<table><caption", "<table>"))
    shares = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]
    ranks = [max(int(np.ceil(round(share * len(some), 9))), 1) for share in shares]
    assert percentiles[0] == ["percentile", *(f"{share:.0%}" for share in shares)]
    assert percentiles[1] == ["score", *(f"{np.sort(some)[rank - 1]:.3f}" for rank in ranks)]
    marks = [float(row[0]) for row in kept[1:]]
    expected = at_least(found, marks)
    assert [row[1] for row in kept[1:]] == [f"{n:,}" for n in expected]
    assert [row[2] for row in kept[1:]] == [f"{100 * n / len(found):.1f}%" for n in expected]
    return data


def check_groups(
    column: dict[str, Any], expected: dict[str, list[Row]], thresholds: Sequence[float]
) -> None:
    shown = {group["label"]: group for group in column["groups"]}
    assert len(shown) == len(column["groups"])
    assert shown.keys() == expected.keys()
    for label, found in expected.items():
        group = shown[label]
        assert (group["rows"], group["scored"]) == (len(found), len(scored(found))), label
        assert group["rows_from"] == at_least(found, thresholds), label


def grouped(found: Sequence[Row], of: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in found:
        groups.setdefault(of(row), []).append(row)
    return groups


# Scores as one likes.


def scores_file(path: Path, scores: Any, ids: Sequence[str] | None = None, **columns: Any) -> Path:
    count = len(scores)
    why = columns.pop("error", [None] * count)
    table = pa.table(
        {
            "image_id": pa.array(ids or [f"{n:06d}" for n in range(count)], pa.string()),
            "aesthetic_score": pa.array(scores, pa.float32()),
            "error": pa.array(why, pa.string()),
            **columns,
        }
    )
    stamp = {"head": {"name": "one", "sha256": "ab"}}
    table = table.replace_schema_metadata({b"aesthetic_filter": json.dumps(stamp).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=20_000)
    return path


# Embeddings, with columns of all sorts.


@dataclass(frozen=True)
class Made:
    """Scores, their rows, and the source."""

    scores: Path
    source: Path
    rows: list[Row]


@pytest.fixture(scope="module")
def embedded(
    make_embeddings: Callable[..., NDArray[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """3,000 rows in two files; some fail, some are foreign."""
    folder = tmp_path_factory.mktemp("embedded")
    chance = np.random.default_rng(2)
    vectors = make_embeddings(3000, seed=2, dtype=np.float32, scale=9.0)
    vectors[100:140] = chance.standard_normal((40, 768))  # of another encoder
    vectors[[5, 6, 7, 8, 9, 10, 2000]] = 0
    vectors[[11, 2001], 3] = np.nan
    tags = [f"tag {n}" for n in range(15)]
    weights = np.arange(15, 0, -1) / 120
    tag = [None if n % 50 == 0 else str(chance.choice(tags, p=weights)) for n in range(3000)]
    width = [None if n % 97 == 0 else int(w) for n, w in enumerate(chance.lognormal(6, 1, 3000))]
    odd = chance.normal(0, 1, 3000)
    odd[:60:3], odd[1:60:3], odd[2:60:3] = np.nan, np.inf, -np.inf
    table = pa.table(
        {
            "image_id": [
                f"x{n % 3}/deep/{n}.jpg" if n % 4 else f"{n}.jpg" if n % 8 else f"a\nb/{n}.jpg"
                for n in range(3000)
            ],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 768),
            "tag": pa.array(tag),
            "width": pa.array(width, pa.int32()),
            "stars": pa.array([None if n % 7 == 0 else n % 7 for n in range(3000)], pa.int8()),
            "taken": pa.array([1_700_000_000 + 40 * n for n in range(3000)], pa.int64()),
            "odd": pa.array(odd),
            "safe": pa.array([n % 5 > 0 for n in range(3000)]),
            "same": pa.array(["same"] * 3000),
            "caption": pa.array([f"caption {n}" for n in range(3000)]),
            "list": pa.array([[n] for n in range(3000)]),
            MARKUP: pa.array([HOSTILE[n % len(HOSTILE)] for n in range(3000)]),
        }
    )
    write_table(folder / "in/0.parquet", {n: table[n].slice(0, 1700) for n in table.column_names})
    write_table(folder / "in/1.parquet", {n: table[n].slice(1700) for n in table.column_names})
    af.score(folder / "in", folder / "scores", allow_foreign=True)
    return Made(folder / "scores", folder / "in", rows(folder / "scores"))


@pytest.fixture(scope="module")
def embedded_page(embedded: Made) -> str:
    page, problem = make_page(
        open_scores(embedded.scores),
        Options(by=("(folder)", "tag", "width", "stars", "taken", "odd", "safe", MARKUP)),
    )
    assert problem == ""
    return page


def test_numbers_of_embeddings(embedded: Made, embedded_page: str) -> None:
    data = check_numbers(embedded_page, embedded.rows)
    assert data["rows"] == 3000
    assert data["scored"] == 2991
    assert 150 <= len(data["grid"]["thresholds"]) <= 402
    # The best tenth, or as little more as the grid has.
    counts = data["grid"]["rows_from"]
    assert counts[data["start"]] >= 299.1 > counts[data["start"] + 1]
    assert not warnings_of(embedded_page)


def test_norms_and_cosines(embedded: Made, embedded_page: str) -> None:
    some = scored(embedded.rows)
    cosines = np.array([row["reference_cosine"] for row in some], np.float32)
    foreign = int((cosines < np.float32(0.35)).sum())
    assert foreign == 40
    assert facts_of(embedded_page)["look foreign"] == "40"
    told = plain(section(embedded_page, "norms"))
    assert f"40 scored rows ({40 / 29.91:.1f}%) do not look like" in told
    norms = sorted(row["embedding_norm"] for row in some)
    middle = norms[(len(norms) + 1) // 2 - 1]
    assert f"Norms from {norms[0]:.4g} to {norms[-1]:.4g}, median {middle:.4g}." in told
    data = data_of(embedded_page)
    step, bins = data["cosines"]["step"], data["cosines"]["bins"]
    assert sum(count for _, count in bins) == len(some)
    expected = Counter(np.floor(cosines.astype(np.float64) / step).astype(int).tolist())
    assert dict(map(tuple, bins)) == dict(expected)
    assert data["foreign_below"] == 0.35


def test_groups_by_value(embedded: Made, embedded_page: str) -> None:
    data = data_of(embedded_page)
    thresholds = data["grid"]["thresholds"]
    by = {column["name"]: column for column in data["groups"]}
    found = embedded.rows
    assert list(by) == ["(folder)", "tag", "width", "stars", "taken", "odd", "safe", MARKUP]

    def folder(row: Row) -> str:
        return str(row["image_id"]).rpartition("/")[0].replace("\n", "\\n") or "(empty)"

    check_groups(by["(folder)"], grouped(found, folder), thresholds)
    assert {group["label"] for group in by["(folder)"]["groups"]} == {
        *("x0/deep", "x1/deep", "x2/deep", "a\\nb", "(empty)")
    }
    tags = grouped(found, lambda row: "(none)" if row["tag"] is None else row["tag"])
    largest = sorted(tags, key=lambda tag: (-len(tags[tag]), "None" if tag == "(none)" else tag))
    assert len(largest) == 16
    others = [row for tag in largest[12:] for row in tags[tag]]
    check_groups(
        by["tag"], {tag: tags[tag] for tag in largest[:12]} | {"4 others": others}, thresholds
    )
    assert [group["label"] for group in by["tag"]["groups"]] == [*largest[:12], "4 others"]
    stars = grouped(found, lambda row: "(none)" if row["stars"] is None else str(row["stars"]))
    check_groups(by["stars"], stars, thresholds)
    assert [group["label"] for group in by["stars"]["groups"]] == [*"123456", "(none)"]
    check_groups(by["safe"], grouped(found, lambda row: str(row["safe"]).lower()), thresholds)
    shown = grouped(
        found, lambda row: row[MARKUP].replace("\n", "\\n").replace("\u202e", "\\u202e")
    )
    check_groups(by[MARKUP], shown, thresholds)


@pytest.mark.parametrize("name", ["width", "taken"])
def test_groups_by_range(name: str, embedded: Made, embedded_page: str) -> None:
    data = data_of(embedded_page)
    (column,) = [column for column in data["groups"] if column["name"] == name]
    *ranges, none = column["groups"] if name == "width" else [*column["groups"], None]
    if none is not None:
        assert none["label"] == "(none)"
        assert none["rows"] == sum(row[name] is None for row in embedded.rows)
    assert len(ranges) == 6
    ends = [
        [float(end.replace(",", "")) for end in group["label"].split(" to ")] for group in ranges
    ]
    there = [row for row in embedded.rows if row[name] is not None]
    numbers = [row[name] for row in there]
    assert ends[0][0] == min(numbers)
    assert ends[-1][1] == max(numbers)
    assert all(one[1] == other[0] for one, other in pairwise(ends))
    inner = [end[1] for end in ends[:-1]]
    bins = grouped(there, lambda row: int(np.searchsorted(inner, row[name], side="right")))
    expected = {group["label"]: bins[n] for n, group in enumerate(ranges)}
    check_groups({"groups": ranges}, expected, data["grid"]["thresholds"])
    sizes = [group["scored"] for group in ranges]
    assert max(sizes) < 1.1 * min(sizes)


def test_numbers_that_are_none(embedded: Made, embedded_page: str) -> None:
    """NaN and infinities in a column of the source."""
    data = data_of(embedded_page)
    (column,) = [column for column in data["groups"] if column["name"] == "odd"]
    by = {group["label"]: group for group in column["groups"]}
    assert len(by) == len(column["groups"])
    finite = [group for label, group in by.items() if " to " in label]
    assert len(finite) == 6
    for label in ("-inf", "inf", "nan"):
        rows_ = [row for row in embedded.rows if str(row["odd"]) == label]
        assert by[label]["rows"] == len(rows_) == 20
        assert by[label]["rows_from"] == at_least(rows_, data["grid"]["thresholds"])
    assert sum(group["rows"] for group in finite) == 3000 - 60


def test_which_columns_are_broken_down(embedded: Made) -> None:
    data = made(embedded.scores)[1]
    names = [column["name"] for column in data["groups"]]
    assert names == ["(folder)", "tag", "width", "stars", "taken", "odd", "safe", MARKUP]
    with pytest.raises(SelectionError, match="no column 'colour'; there are: image_id, "):
        made(embedded.scores, by=("colour",))


def test_many_columns_are_not_all_broken_down(tmp_path: Path) -> None:
    columns = {f"c{n}": [str(k % 3) for k in range(30)] for n in range(40)}
    path = scores_file(tmp_path / "s.parquet", np.linspace(4, 6, 30), **columns)
    data = made(path)[1]
    assert [column["name"] for column in data["groups"]] == [f"c{n}" for n in range(8)]
    data = made(path, by=tuple(f"c{n}" for n in range(20)))[1]
    assert [column["name"] for column in data["groups"]] == [f"c{n}" for n in range(20)]


def test_failures(embedded: Made, embedded_page: str) -> None:
    ((head, *lines),) = tables(section(embedded_page, "failures"))
    assert head == ["reason", "rows", "for example"]
    without = [row for row in embedded.rows if row["aesthetic_score"] is None]
    expected = grouped(without, lambda row: row["error"])
    assert sorted(map(len, expected.values())) == [2, 7]
    assert {line[0]: int(line[1]) for line in lines} == {
        reason: len(found) for reason, found in expected.items()
    }
    assert [int(line[1]) for line in lines] == [7, 2]
    for reason, _, examples in lines:
        shown = [row["image_id"].replace("\n", "\\n") for row in expected[reason]]
        assert examples == ", ".join(shown[:5]) + (" …" if len(shown) > 5 else "")


def test_provenance_and_the_table(embedded: Made, embedded_page: str) -> None:
    facts = section(embedded_page, "provenance")
    told = dict(
        zip(
            map(plain, re.findall(r"<dt>(.*?)</dt>", facts)),
            map(plain, re.findall(r"<dd>(.*?)</dd>", facts)),
            strict=True,
        )
    )
    stamp = json.loads((embedded.scores / "_run.json").read_text())
    assert told["head"] == stamp["head"]["name"]
    assert told["head sha256"] == stamp["head"]["sha256"]
    assert told["source"] == str(embedded.source)
    assert told["format"] == stamp["format"]
    assert told["made by"] == f"aesthetic-filter {af.__version__}"
    assert "encoder" not in told
    data = data_of(embedded_page)
    assert all(item["image"] is None for item in data["gallery"])
    assert not any(item["problem"] for item in data["gallery"])
    ids = {row["image_id"].replace("\n", "\\n"): row for row in embedded.rows}
    for item in data["gallery"]:
        row, facts_ = ids[item["id"]], dict(item["facts"])
        assert item["score"] == row["aesthetic_score"]
        assert facts_["caption"] == row["caption"]
        assert facts_[MARKUP] == row[MARKUP].replace("\n", "\\n").replace("\u202e", "\\u202e")
        assert facts_.get("width", "") == ("" if row["width"] is None else str(row["width"]))


def check_gallery(data: dict[str, Any], found: Sequence[Row], per_band: int = 12) -> None:
    """Who is shown, and why."""
    gallery = data["gallery"]
    some = scored(found)
    best = sorted(some, key=lambda row: (-row["aesthetic_score"], row["image_id"]))
    worst = sorted(some, key=lambda row: (row["aesthetic_score"], row["image_id"]))
    at = np.float32(data["grid"]["thresholds"][data["start"]])
    above = [row for row in worst if row["aesthetic_score"] >= at]
    below = [row for row in best if row["aesthetic_score"] < at]
    for why, rows_ in (
        ("best", best[:24]),
        ("worst", worst[:24]),
        ("border", above[:12] + below[:12]),
    ):
        names = {row["image_id"] for row in rows_}
        assert {item["id"] for item in gallery if why in item["why"]} == names, why
    assert len({item["id"] for item in gallery}) == len(gallery)
    keys = [(-item["score"], item["id"]) for item in gallery]
    assert keys == sorted(keys)
    drawn = Counter(item["band"] for item in gallery if "band" in item["why"])
    for number, band in enumerate(data["bands"]):
        low, high = (np.float32(end) for end in band["name"].split(" to "))
        here = {row["image_id"] for row in some if low <= np.float32(row["aesthetic_score"]) < high}
        assert band["rows"] == len(here)
        assert drawn[number] == min(per_band, len(here))
        assert {item["id"] for item in gallery if item["band"] == number} <= here


def test_who_is_shown(tmp_path: Path) -> None:
    chance = np.random.default_rng(4)
    values_ = np.round(chance.normal(5, 0.6, 4000), 2)  # many ties
    found = [
        {"image_id": f"{n:06d}", "aesthetic_score": float(np.float32(v))}
        for n, v in enumerate(values_)
    ]
    path = scores_file(tmp_path / "s.parquet", values_)
    seen = []
    for options in ({}, {"seed": 1}, {"threshold": 4.1, "per_band": 30}, {"threshold": 99}):
        page, data, _ = made(path, **options)  # type: ignore[arg-type]
        check_numbers(page, found)
        check_gallery(data, found, int(options.get("per_band", 12)))
        seen.append({item["id"] for item in data["gallery"] if "band" in item["why"]})
    assert seen[0] != seen[1]
    assert (
        made(path, threshold=4.1)[1]["start"]
        == np.abs(np.array(data["grid"]["thresholds"]) - 4.1).argmin()
    )
    assert data["start"] == len(data["grid"]["thresholds"]) - 1
    assert MADE_AT.sub("", made(path)[0]) == MADE_AT.sub("", made(path, seed=0)[0])


# The printed commands.


def run(words: Sequence[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    assert words[0] == "aesthetic-filter"
    return subprocess.run(
        [sys.executable, "-m", "aesthetic_filter", *words[1:]],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_the_printed_commands_make_it_again(embedded: Made, cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "it's a report.html"
    words = ["--out", out, "--by", MARKUP, "--by", "tag", "--seed", 7, "--threshold", "5.25"]
    done = cli("report", embedded.scores, *words, "--per-band", 3, "--max-mb", 2.5)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(out) in done.stdout
    first = out.read_text()
    again, report_ = commands_of(first)
    assert report_[:3] == ["aesthetic-filter", "report", str(embedded.scores)]
    out.unlink()
    done = run(report_, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert MADE_AT.sub("", out.read_text()) == MADE_AT.sub("", first)
    assert again[:3] == ["aesthetic-filter", "score", str(embedded.source)]
    new = tmp_path / "new"
    again[again.index("--out") + 1] = str(new)
    assert run([*again, "--allow-foreign"], tmp_path).returncode == 0
    assert [row["aesthetic_score"] for row in rows(new)] == [
        row["aesthetic_score"] for row in embedded.rows
    ]


def test_only_a_run_has_a_command_that_makes_it(embedded: Made, tmp_path: Path) -> None:
    """What was chosen from scores, and a single file of them, is not what ``score`` writes."""
    scores = open_scores(embedded.scores)
    scores.select(top=50).write(tmp_path / "kept")
    for path in (tmp_path / "kept", scores.files[0]):
        page = made(path)[0]
        assert [words[1] for words in commands_of(page)] in ([], ["report"])


# Images.

NAMES = ("plain.jpg", f"{MARKUP}.jpg", "a \"b\" & 'c'.jpg", "two\nlines.jpg", f"{RTL}.jpg")


def noise(seed: int, side: int = 1000, grain: int = 100) -> bytes:
    """A large JPEG that cannot be made small: coarse noise, down to the smallest thumbnail."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(0, 256, (grain, grain, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.NEAREST).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder of 60 photographs, some with names that would like to be markup."""
    folder = tmp_path_factory.mktemp("photos")
    files = {f"{'abc'[n % 3]}/{n:02d}.jpg": jpeg(n, 24 + n) for n in range(52)}
    files |= {f"odd/{name}": jpeg(100 + n, 40) for n, name in enumerate(NAMES)}
    files[f"odd/{SCRIPT}.jpg"] = jpeg(200)
    files["turned.jpg"] = turned(9, 300, 200, 6)
    files["b/broken.jpg"] = b"no image"
    write_files(folder / "in", files)
    (folder / "in" / os.fsdecode(b"bad\xff.jpg")).write_bytes(jpeg(201))
    af.score(folder / "in", folder / "scores", model_dir=model_dir, images=EXACT)
    return Made(folder / "scores", folder / "in", rows(folder / "scores"))


@pytest.fixture(scope="module")
def photos_page(photos: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report as a file, with the best, the worst, all."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    path, problem = report(open_scores(photos.scores), out, Options(per_band=40))
    assert (path, problem) == (out, "")
    return out


def shown_id(row: Row) -> str:
    return str(row["image_id"]).replace("\n", "\\n").replace("\u202e", "\\u202e")


def same_picture(shown: Image.Image, data: bytes) -> bool:
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if shown.size != wanted.size:
        wanted.thumbnail((320, 320), Image.Resampling.LANCZOS)
    if shown.size != wanted.size:
        return False
    apart = np.asarray(shown, np.int16) - np.asarray(wanted, np.int16)
    return bool(np.abs(apart).mean() < 12)


def test_images_of_a_folder(photos: Made, photos_page: Path) -> None:
    page = photos_page.read_text()
    data = check_numbers(page, photos.rows)
    here = [row | {"image_id": shown_id(row)} for row in photos.rows]
    check_gallery(data, here, 40)
    assert len(data["gallery"]) == data["scored"] == len(photos.rows) - 1
    paths = {shown_id(row): row["image_id"] for row in photos.rows}
    for item in data["gallery"]:
        assert item["problem"] == ""
        name = paths[item["id"]].replace("\\xff", os.fsdecode(b"\xff"))
        assert same_picture(thumbnail(item), (photos.source / name).read_bytes()), item["id"]
    (upright,) = [item for item in data["gallery"] if item["id"] == "turned.jpg"]
    assert (upright["image"]["w"], upright["image"]["h"]) == (200, 300)
    ((_, *lines),) = tables(section(page, "failures"))
    assert lines == [["not an image that can be decoded", "1", "b/broken.jpg"]]
    assert alarming(page) == []


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_of_archives(kind: str, model_dir: Path, tmp_path: Path) -> None:
    images = [jpeg(n, 30) for n in range(10)]
    images[4] = turned(3, 100, 60, 8)
    captions = [HOSTILE[n % len(HOSTILE)] for n in range(10)]
    if kind == "tar":
        members = []
        for n, image in enumerate(images):
            members += [
                (f"../{n}{MARKUP[:12]}.jpg", image),
                (f"../{n}{MARKUP[:12]}.txt", captions[n].encode()),
            ]
        write_tar(tmp_path / "in/0.tar", members[:10])
        write_tar(tmp_path / "in/1.tar", members[10:])
    else:
        structs = [{"bytes": image, "path": f"{n}.jpg"} for n, image in enumerate(images)]
        for part, some in enumerate((slice(0, 5), slice(5, 10))):
            write_table(
                tmp_path / f"in/{part}.parquet", {"image": structs[some], "txt": captions[some]}
            )
    af.score(tmp_path / "in", tmp_path / "scores", model_dir=model_dir, images=EXACT)
    found = rows(tmp_path / "scores")
    page, data, problem = made(tmp_path / "scores")
    assert problem == ""
    check_numbers(page, found)
    assert len(data["gallery"]) == 10
    by = {row["image_id"]: n for n, row in enumerate(found)}
    for item in data["gallery"]:
        number = by[item["id"]]
        assert same_picture(thumbnail(item), images[number])
        caption = captions[number].replace("\n", "\\n").replace("\u202e", "\\u202e")
        assert dict(item["facts"])["txt"] == caption
    assert alarming(page) == []

    # The source is gone; then it is found elsewhere.
    (tmp_path / "in").rename(tmp_path / "moved")
    page, data, problem = made(tmp_path / "scores")
    assert str(tmp_path / "in") in problem
    assert warnings_of(page) == [problem]
    assert len(data["gallery"]) == 10
    assert not any(item["image"] for item in data["gallery"])
    page, data, problem = made(tmp_path / "scores", source=str(tmp_path / "moved"))
    assert problem == ""
    assert all(item["image"] for item in data["gallery"])
    (tmp_path / "moved" / f"1.{kind}").unlink()
    page, data, problem = made(tmp_path / "scores", source=str(tmp_path / "moved"))
    assert problem == f"5 of 10 images cannot be shown: 1.{kind} is gone"
    for item in data["gallery"]:
        assert (item["image"] is None) == (item["problem"] != "") == (by[item["id"]] >= 5)


def test_no_images(photos: Made, tmp_path: Path, cli: Run) -> None:
    done = cli("report", photos.scores, "--out", "r.html", "--no-images", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "r.html").read_text()
    data = check_numbers(page, photos.rows)
    assert data["gallery"]
    assert not any(item["image"] or item["problem"] for item in data["gallery"])
    assert ">Rows<" in page
    assert "data:image" not in page
    assert "--no-images" in commands_of(page)[1]


def test_half_of_the_files_are_gone_and_one_has_changed(
    photos: Made, tmp_path: Path, cli: Run
) -> None:
    source = tmp_path / "half"
    shutil.copytree(photos.source, source)
    gone = set()
    for n in range(0, 52, 2):
        gone.add(f"{'abc'[n % 3]}/{n:02d}.jpg")
    for name in gone:
        (source / name).unlink()
    (source / "a/03.jpg").write_bytes(jpeg(999))
    (source / "c/05.jpg").write_bytes(b"")
    done = cli(
        *("report", photos.scores, "--out", "new/dir/r.html"),
        *("--source", source, "--per-band", 99),
    )
    assert done.returncode == 0
    assert done.stderr.startswith("aesthetic-filter: 28 of 60 images cannot be shown: ")
    page = (tmp_path / "new/dir/r.html").read_text()
    data = check_numbers(page, photos.rows)
    assert len(data["gallery"]) == 60
    why = dict.fromkeys(gone, "is gone from the source")
    why["a/03.jpg"] = "has changed since it was scored"
    why["c/05.jpg"] = "has changed since it was scored"
    for item in data["gallery"]:
        assert item["problem"] == why.get(item["id"], "")
        assert (item["image"] is None) == (item["id"] in why)
    assert warnings_of(page) == [done.stderr.strip().removeprefix("aesthetic-filter: ")]
    # And the command that is printed says where the images were.
    assert commands_of(page)[1][-4:-2] == ["--source", str(source)]


@pytest.fixture(scope="module")
def large(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """300 large noisy files, of few pictures."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "in").mkdir()
    for n in range(6):
        (folder / f"{n}.jpg").write_bytes(noise(n))
    for n in range(300):
        os.link(folder / f"{n % 6}.jpg", folder / f"in/{n:03d}.jpg")
    af.score(
        folder / "in",
        folder / "scores",
        model_dir=model_dir,
        images=replace(EXACT, decode="fast"),
    )
    return Made(folder / "scores", folder / "in", rows(folder / "scores"))


@pytest.mark.parametrize(("max_mb", "per_band"), [(None, 12), (1.5, 30)])
def test_a_page_fits(max_mb: float | None, per_band: int, large: Made, tmp_path: Path) -> None:
    limit = 5_000_000 if max_mb is None else int(max_mb * 1e6)
    out = tmp_path / "r.html"
    seen: list[tuple[int, int]] = []
    _, problem = report(
        open_scores(large.scores),
        out,
        Options(max_bytes=limit, per_band=per_band),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert problem == ""
    assert 0.3 * limit < out.stat().st_size < limit
    data = check_numbers(out.read_text(), large.rows)
    shown = data["gallery"]
    assert len(shown) > 60
    assert seen == [(n, len(shown)) for n in range(1, len(shown) + 1)]
    for item in shown[::7]:
        image = thumbnail(item)
        assert image.width == image.height <= 320
        assert np.asarray(image).std() > 20


def test_texts_count_too(tmp_path: Path) -> None:
    """Long captions in many columns: images have what they leave."""
    long = ["猫" * 400 + str(n) for n in range(300)]
    path = scores_file(
        tmp_path / "s.parquet",
        np.linspace(4, 6, 300),
        **{f"c{n}": long for n in range(30)},
    )
    page, data, _ = made(path)
    assert len(page.encode()) < 5_000_000
    for item in data["gallery"]:
        assert all(len(value) <= 300 for _, value in item["facts"])


# Scores that are hardly any.


def test_nothing_has_a_score(tmp_path: Path, cli: Run) -> None:
    why = [f"{SCRIPT} of {MARKUP}", None, "two\nlines"]
    scores_file(tmp_path / "s.parquet", [None, np.nan, 1.0], [MARKUP, RTL, "c"], error=why)
    done = cli("report", "s.parquet", "--out", "r.html")
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "r.html").read_text()
    data = data_of(page)
    assert data["grid"] is None
    assert (data["rows"], data["scored"], data["gallery"]) == (3, 0, [])
    assert ">No row has a score<" in page
    ((_, *lines),) = tables(section(page, "failures"))
    assert sorted(lines) == sorted(
        [
            [f"{SCRIPT} of {MARKUP}", "1", MARKUP],
            ["no score", "1", RTL.replace("\u202e", "\\u202e")],
            ["two\\nlines", "1", "c"],
        ]
    )
    assert alarming(page) == []


@pytest.mark.parametrize("value", [5.0, 5.1234567, -3.3, 0.0, 1234.567])
@pytest.mark.parametrize("count", [1, 40])
def test_all_scores_are_the_same(value: float, count: int, tmp_path: Path) -> None:
    path = scores_file(tmp_path / "s.parquet", [value] * count, tag=list("ab" * count)[:count])
    found = [
        {"image_id": f"{n:06d}", "aesthetic_score": float(np.float32(value))} for n in range(count)
    ]
    page, data, _ = made(path)
    check_numbers(page, found)
    assert data["grid"]["rows_from"][data["start"]] == count
    check_gallery(data, found)
    for column in data["groups"]:
        assert [g["rows_from"][0] for g in column["groups"]] == [count // 2] * 2


def test_scores_close_together_far_from_zero(tmp_path: Path) -> None:
    """Closer than float32 can tell the grid's thresholds apart."""
    one = np.float32(100)
    steps = [one]
    for _ in range(30):
        steps.append(np.nextafter(steps[-1], np.float32(200)))
    scores = np.repeat(np.array(steps), 3)
    tags = ["x" if n % 2 else "y" for n in range(len(scores))]
    path = scores_file(tmp_path / "s.parquet", scores, tag=tags)
    found = [
        {"image_id": f"{n:06d}", "aesthetic_score": float(v), "tag": tag}
        for n, (v, tag) in enumerate(zip(scores, tags, strict=True))
    ]
    data = check_numbers(made(path)[0], found)
    check_groups(
        data["groups"][0], grouped(found, lambda row: row["tag"]), data["grid"]["thresholds"]
    )


def test_an_unfinished_run(embedded: Made, tmp_path: Path, cli: Run) -> None:
    shutil.copytree(embedded.scores, tmp_path / "scores")
    run_file = tmp_path / "scores/_run.json"
    stamp = json.loads(run_file.read_text()) | {
        "status": "incomplete",
        "broken_shards": [{"shard": f"{MARKUP}.parquet", "error": f"cut {SCRIPT}"}],
    }
    run_file.write_text(json.dumps(stamp))
    open_scores(tmp_path / "scores").files[1].unlink()
    done = cli("report", "scores", "--out", "r.html")
    assert done.returncode == 0
    page = (tmp_path / "r.html").read_text()
    check_numbers(page, rows(tmp_path / "scores"))
    told = warnings_of(page)
    assert told[0].startswith("The scores are not complete")
    assert told[1] == f"Broken shard {MARKUP}.parquet: cut {SCRIPT}"
    assert alarming(page) == []


def test_many_rows(tmp_path: Path) -> None:
    chance = np.random.default_rng(8)
    scores = chance.normal(5.2, 0.7, 50_000).astype(np.float32)
    scores[::7] = np.round(scores[::7], 2)  # on the thresholds themselves
    listed: list[Any] = scores.tolist()
    error: list[str | None] = [None] * 50_000
    for n in range(0, 50_000, 1000):
        listed[n], error[n] = None, f"reason {n % 3}"
    tags = chance.integers(0, 40, 50_000)
    path = scores_file(
        tmp_path / "s.parquet",
        listed,
        [f"{n % 9}/{n:05d}.jpg" for n in range(50_000)],
        error=error,
        tag=[f"t{t}" for t in tags],
        width=chance.integers(10, 4000, 50_000),
    )
    found = pq.ParquetFile(path).read().to_pylist()
    page, data, _ = made(path)
    assert len(page.encode()) < 5_000_000
    check_numbers(page, found)
    check_gallery(data, found)
    by = {column["name"]: column for column in data["groups"]}
    thresholds = data["grid"]["thresholds"]
    check_groups(by["(folder)"], grouped(found, lambda row: row["image_id"][0]), thresholds)
    groups = grouped(found, lambda row: row["tag"])
    largest = sorted(groups, key=lambda tag: (-len(groups[tag]), tag))
    others = [row for tag in largest[12:] for row in groups[tag]]
    check_groups(
        by["tag"], {tag: groups[tag] for tag in largest[:12]} | {"28 others": others}, thresholds
    )
    assert [group["rows"] for group in by["width"]["groups"]] == pytest.approx([8333] * 6, rel=0.02)
    assert sum(group["rows"] for group in by["width"]["groups"]) == 50_000
    ((_, *lines),) = tables(section(page, "failures"))
    assert [line[:2] for line in lines] == [
        [reason, str(count)] for reason, count in Counter(filter(None, error)).most_common()
    ]


# Where it cannot be written, or not be made.


def leftovers(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_cannot_be_made(tmp_path: Path, cli: Run) -> None:
    scores_file(tmp_path / "s.parquet", np.linspace(4, 6, 50))
    (tmp_path / "earlier.html").write_text("earlier")
    (tmp_path / "folder").mkdir()
    before = leftovers(tmp_path)
    for words, message in (
        (
            ["s.parquet", "--out", "folder"],
            "folder: is a folder; name a file, such as folder/report",
        ),
        (["s.parquet", "--out", "earlier.html/r.html"], "cannot be written: "),
        (["s.parquet", "--out", "x" * 300], "cannot be written: "),
        (["s.parquet", "--out", "earlier.html", "--by", "colour"], "there is no column 'colour'"),
        (["nothing", "--out", "earlier.html"], "nothing: there is nothing there"),
    ):
        done = cli("report", *words)
        assert done.returncode == 2, words
        assert done.stdout == ""
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 2
    assert leftovers(tmp_path) == before
    assert (tmp_path / "earlier.html").read_text() == "earlier"


def test_the_disk_is_full(tmp_path: Path) -> None:
    scores_file(tmp_path / "s.parquet", np.linspace(4, 6, 50))
    (tmp_path / "earlier.html").write_text("earlier")

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = ["aesthetic-filter", "report", "s.parquet", "--out", "earlier.html"]
    done = run(words, tmp_path, preexec_fn=no_large_files)
    assert done.returncode == 2
    assert done.stderr.startswith("aesthetic-filter: earlier.html: cannot be written: ")
    assert (tmp_path / "earlier.html").read_text() == "earlier"
    assert leftovers(tmp_path) == ["earlier.html", "s.parquet"]


def test_names_that_are_no_text(tmp_path: Path, cli: Run) -> None:
    """Folders whose names are not UTF-8, have a line break, or would like to be markup."""
    here = scores_file(tmp_path / "s.parquet", np.linspace(4, 6, 50))
    for name in (os.fsdecode(b"bad\xff"), "two\nlines", SCRIPT):
        out, problem = report(open_scores(here), tmp_path / name / "r.html")
        assert problem == ""
        assert alarming(out.read_text()) == []
    for name in ("three\nlines", f"{SCRIPT} too"):
        path = scores_file(tmp_path / name / "s.parquet", np.linspace(4, 6, 50))
        assert alarming(made(path)[0]) == []
    done = cli("report", "s.parquet", "--out", os.fsdecode(b"\xfe.html"), "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / os.fsdecode(b"\xfe.html")).stat().st_size > 100_000


# In a browser.


@pytest.fixture(scope="module")
def opened(browser: Any, photos_page: Path) -> Iterator[Watched]:
    with watched(browser, as_address(photos_page), wait="#gallery figure") as seen:
        seen.page.on(
            "dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss())
        )
        yield seen
        assert seen.complaints == []
        assert seen.outside(as_address(photos_page)) == []


def settle(page: Any) -> None:
    """Charts follow a new size a few frames later."""
    page.evaluate(
        "new Promise(done => { let n = 6;"
        " const f = () => --n ? requestAnimationFrame(f) : done(); f(); })"
    )


def keeps(found: Sequence[Row], threshold: float) -> str:
    (kept,), total = at_least(found, [threshold]), len(scored(found))
    return f"keeps {kept:,} of {total:,} ({100 * kept / total:.1f}%)"


def threshold_of(page: Any) -> float:
    return float(page.input_value("#threshold-number"))


def check_marks(page: Any, found: Sequence[Row]) -> None:
    """What is kept at the threshold, in words and on every image shown."""
    at = threshold_of(page)
    assert page.inner_text("#keeps") == keeps(found, at)
    figures = page.eval_on_selector_all(
        "#gallery figure", "all => all.map(f => [f.querySelector('.name').innerText, f.className])"
    )
    by = {shown_id(row): row["aesthetic_score"] for row in scored(found)}
    assert figures
    for name, kind in figures:
        assert kind == ("kept" if np.float32(by[name]) >= np.float32(at) else "dropped")
    kept = sum(kind == "kept" for _, kind in figures)
    assert page.inner_text("#gallery-says") == (
        f"{len(figures)} shown, {kept} of them kept at {at:g}, {len(figures) - kept} dropped."
    )


def shown_ids(page: Any) -> list[str]:
    found: list[str] = page.locator("#gallery figure .name").all_inner_texts()
    return found


def test_opened_from_disk(photos: Made, photos_page: Path, browser: Any) -> None:
    address = as_address(photos_page)
    messages = []
    with watched(browser, address, wait="#gallery figure") as seen:
        seen.page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        seen.page.reload()
        seen.page.wait_for_selector("#gallery figure")
        check_marks(seen.page, photos.rows)
        alts = seen.page.eval_on_selector_all("img", "all => all.map(i => [i.alt, i.naturalWidth])")
        assert len(alts) == 60
        assert all(alt and width for alt, width in alts)
        assert (
            seen.page.evaluate("document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
        )
        assert set(map(shown_id, scored(photos.rows))) == set(shown_ids(seen.page))
        assert seen.page.title().startswith("Aesthetic scores of ")
    assert seen.complaints == messages == []
    assert seen.requests == [address] * 2


def test_the_slider(photos: Made, opened: Watched) -> None:
    page, start = opened.page, threshold_of(opened.page)
    thresholds = data_of(page.content())["grid"]["thresholds"]
    page.focus("#threshold")
    page.keyboard.press("ArrowRight")
    assert threshold_of(page) == thresholds[thresholds.index(start) + 1]
    check_marks(page, photos.rows)
    page.keyboard.press("Home")
    assert page.inner_text("#keeps") == "keeps 60 of 60 (100.0%)"
    page.keyboard.press("End")
    assert threshold_of(page) == thresholds[-1]
    check_marks(page, photos.rows)
    middle = (thresholds[0] + thresholds[-1]) / 2
    for typed, becomes in (
        (f"{middle:.6f}", min(thresholds, key=lambda t: abs(t - float(f"{middle:.6f}")))),
        ("1e9", thresholds[-1]),
        ("-5", thresholds[0]),
        (str(thresholds[40]), thresholds[40]),
    ):
        page.fill("#threshold-number", typed)
        page.keyboard.press("Enter")
        assert threshold_of(page) == becomes
        assert int(page.input_value("#threshold")) == thresholds.index(becomes)
        check_marks(page, photos.rows)
    page.fill("#threshold-number", "")
    page.keyboard.press("Enter")
    assert threshold_of(page) == thresholds[40]


def test_the_charts_have_the_numbers(photos: Made, opened: Watched) -> None:
    page, some = opened.page, values(photos.rows)
    labels, counts, shares = page.evaluate(
        "() => { const { labels, datasets } = Chart.getChart('histogram').data;"
        " return [labels, datasets[0].data, datasets[1].data]; }"
    )
    marks = np.array(labels[1:]).astype(np.float32)
    assert (
        counts == np.bincount(np.searchsorted(marks, some, "right"), minlength=len(labels)).tolist()
    )
    expected = [100.0, *(100 * (some >= mark).mean() for mark in marks)]
    assert shares == pytest.approx(expected)
    data = data_of(page.content())
    page.select_option("#by", label="(folder)")
    at = threshold_of(page)
    ((_, *lines),) = tables(page.inner_html("#groups-table"))
    groups = grouped(photos.rows, lambda row: row["image_id"].rpartition("/")[0] or "(empty)")
    assert len(lines) == len(groups) == len(data["groups"][0]["groups"])
    for label, all_, good, _, kept, share in lines:
        here = groups[label]
        (expected_kept,) = at_least(here, [at])
        assert (all_, good, kept) == (str(len(here)), str(len(scored(here))), str(expected_kept))
        assert share == f"{100 * expected_kept / len(scored(here)):.1f}%"
    cosines = page.evaluate("Chart.getChart('cosines').data.datasets[0].data")
    assert sum(cosines) == 60


def test_tabs_by_keyboard(photos: Made, opened: Watched) -> None:
    page = opened.page
    tabs = page.locator("[role=tab]")
    assert tabs.all_inner_texts() == [
        *("Best", "Around the threshold", "By score band", "Worst", "All shown")
    ]
    some = sorted(scored(photos.rows), key=lambda row: (-row["aesthetic_score"], row["image_id"]))
    best = [shown_id(row) for row in some]
    tabs.nth(2).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "Worst"
    assert shown_ids(page) == best[::-1][:24]
    page.keyboard.press("ArrowRight")
    assert shown_ids(page) == best
    page.keyboard.press("ArrowRight")
    assert page.locator("[role=tab][aria-selected=true]").all_inner_texts() == ["Best"]
    assert shown_ids(page) == best[:24]
    page.keyboard.press("ArrowRight")
    for mark in (10, 30, 45):
        number = sorted(float(row["aesthetic_score"]) for row in some)[mark]
        page.fill("#threshold-number", str(number))
        page.keyboard.press("Enter")
        at = np.float32(threshold_of(page))
        kept = sum(row["aesthetic_score"] >= at for row in some)
        assert shown_ids(page) == best[max(kept - 12, 0) : kept + 12]
        check_marks(page, photos.rows)
    assert [tab.get_attribute("tabindex") for tab in tabs.all()] == ["-1", "0", "-1", "-1", "-1"]


def test_the_viewer(photos: Made, opened: Watched) -> None:
    page = opened.page
    page.get_by_role("tab", name="Best").click()
    ids = shown_ids(page)
    dialog = page.locator("#viewer")
    assert not dialog.is_visible()
    page.locator("#gallery figure").first.focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    by = {shown_id(row): row for row in photos.rows}
    for number, key in (
        (0, "ArrowRight"),
        (1, "ArrowRight"),
        (2, "ArrowRight"),
        (3, "ArrowLeft"),
        (2, None),
    ):
        assert dialog.locator("h2").inner_text() == ids[number]
        score = by[ids[number]]["aesthetic_score"]
        assert dialog.locator("dd").first.inner_text() == f"{score:.4f}"
        assert dialog.locator("img").get_attribute("alt") == f"{ids[number]}, score {score:.2f}"
        if key:
            page.keyboard.press(key)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.tagName") == "FIGURE"
    page.keyboard.press("Space")
    page.get_by_role("button", name="← Previous").click()
    assert dialog.locator("h2").inner_text() == ids[-1]
    page.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_the_filter_command(photos: Made, opened: Watched) -> None:
    page = opened.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.focus("#threshold")
    for key in ("Home", *["PageUp"] * 5):
        page.keyboard.press(key)
    page.click("#copy")
    page.get_by_role("button", name="Copied").wait_for()
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:5] == ["aesthetic-filter", "filter", str(photos.scores), "--out", "kept"]
    assert words[5] == "--min-score"
    kept = open_scores(words[2]).select(min_score=float(words[6]))
    assert page.inner_text("#keeps").startswith(f"keeps {kept.counts.kept} of 60 ")
    assert 0 < kept.counts.kept < 60


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_prints(dark: bool, photos_page: Path, browser: Any) -> None:
    address = as_address(photos_page)
    with watched(browser, address, dark=dark, wait="#gallery figure") as seen:
        page = seen.page
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
        for width, height in SIZES.values():
            page.set_viewport_size({"width": width, "height": height})
            settle(page)
            assert seen.fits(), width
        page.emulate_media(media="print")
        settle(page)
        hidden = page.locator(".no-print")
        assert hidden.count() > 3
        assert not any(found.is_visible() for found in hidden.all())
        assert page.locator("#keeps").is_visible()
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert seen.fits()
    assert seen.complaints == []
    assert seen.outside(address) == []


@pytest.mark.parametrize("size", SIZES)
def test_a_table_with_hostile_texts(
    size: str, embedded_page: str, browser: Any, tmp_path: Path
) -> None:
    path = tmp_path / "r.html"
    path.write_text(embedded_page)
    messages = []
    with watched(browser, as_address(path), size=size, wait="#gallery table") as seen:
        page = seen.page
        page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        assert seen.fits()
        page.select_option("#by", label=MARKUP)
        told = page.inner_text("#groups-table")
        for label in (MARKUP, SCRIPT, "two\\nlines", "{{ 7 * 7 }}", "ünï \\u202egpj.exe"):
            assert label in told
        assert seen.fits()
        assert page.locator("img").count() == 0
        fates = page.locator("#gallery td.fate").all_inner_texts()
        assert len(fates) == 24
        assert set(fates) == {"kept"}
        page.focus("#threshold")
        page.keyboard.press("End")
        assert "dropped" in page.locator("#gallery td.fate").all_inner_texts()
    assert seen.complaints == messages == []
    assert seen.outside(as_address(path)) == []


def test_a_page_without_scores_opens(browser: Any, tmp_path: Path) -> None:
    for name, scores, why in (("none", [None], ["broken"]), ("one", [5.25], [None])):
        path = scores_file(tmp_path / f"{name}.parquet", scores, [MARKUP], error=why)
        out, _ = report(open_scores(path), tmp_path / f"{name}.html")
        with watched(browser, as_address(out)) as seen:
            assert seen.fits()
            assert MARKUP in seen.page.inner_text("main")
            assert seen.page.locator("img").count() == 0
        assert seen.complaints == []
