"""Label files: what people write, what the review writes, and what a crash leaves."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aesthetic_filter.errors import OutputError, UsageError
from aesthetic_filter.labels import COLUMNS, Label, LabelFile, gather, read_label_rows, read_labels

HOSTILE = [
    "<img src=x onerror=alert(1)>.jpg",
    'quote".jpg',
    "line\nbreak.jpg",
    "carriage\rreturn.jpg",
    "../../etc/passwd",
    "comma,.jpg",
    "ünï\u202egpj.jpg",
    "",
]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("image_id,label\na,keep\nb,drop\nc,Keep\n", [1, 0, 1]),
        ("image_id,label\na,yes\nb,no\n", [1, 0]),
        ("image_id,label\na,1\nb,0\n", [1, 0]),
        ("image_id\tlabel\na\tkeep\nb\tdrop\n", [1, 0]),
        ("\ufefflabel,path\r\nkeep,a\r\ndrop,b\r\n", [1, 0]),
        ('filename,decision,why\na,keep,"nice, isn\'t it"\nb,drop,\n', [1, 0]),
        ("image_id,label\na,keep\nb,skip\nc,\n", [1]),
        ("image_id,label\na,keep\nb,drop", [1, 0]),
    ],
)
def test_what_people_write(tmp_path: Path, text: str, values: list[int]) -> None:
    found = read_labels(written(tmp_path / "labels.csv", text))
    assert found.kind == "keep"
    assert found.values.tolist() == values
    assert found.strata is None


def test_ratings_and_the_mean_of_several(tmp_path: Path) -> None:
    path = written(tmp_path / "r.csv", "image_id,rating,reviewer\na,7,x\na,4,y\nb,2.5,x\nc,,x\n")
    found = read_labels(path)
    assert (found.kind, found.ids, found.values.tolist()) == ("rating", ("a", "b"), [5.5, 2.5])
    kept = read_labels(path, keep_from=5)
    assert (kept.kind, kept.values.tolist()) == ("keep", [0.5, 0.0])


def test_the_last_word_counts_and_an_empty_one_withdraws() -> None:
    found = gather(
        [
            Label("a", "keep", "x"),
            Label("a", "drop", "x"),
            Label("b", "keep", "x"),
            Label("b", "", "x"),
            Label("c", "keep", "x"),
            Label("c", "drop", "y"),
            Label("d", "skip", "x"),
            Label("e", "skip", "x"),
            Label("e", "keep", "y"),
        ]
    )
    assert dict(zip(found.ids, found.values.tolist(), strict=True)) == {"a": 0, "c": 0.5, "e": 1}
    assert found.reviewers == {"x": 2, "y": 2}
    assert found.skipped == 1


def test_strata_are_numbered_in_the_order_of_their_scores() -> None:
    names = ["9.5 to inf", "-inf to 4.5", "10 to 11", "4.5 to 9.5"]
    found = gather([Label(n, "keep", stratum=n, stratum_rows=10 + i) for i, n in enumerate(names)])
    assert found.strata is not None
    assert found.strata.tolist() == [2, 0, 3, 1]
    assert found.stratum_rows.tolist() == [11, 13, 10, 12]


def test_strata_that_are_not_said_of_all_count_for_none() -> None:
    found = gather([Label("a", "keep", stratum="4 to 5", stratum_rows=9), Label("b", "drop")])
    assert found.strata is None
    assert "not every label says" in found.notes[0]


def test_agreement_is_krippendorff_s() -> None:
    """His example of two observers and ten units of binary data: alpha = 0.095.

    K. Krippendorff, Computing Krippendorff's alpha-reliability, 2011, section A.
    """
    meg = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    owen = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    said = [
        Label(str(unit), "keep" if value else "drop", who)
        for who, values in (("meg", meg), ("owen", owen))
        for unit, value in enumerate(values)
    ]
    found = gather(said).agreement
    assert found is not None
    assert found.images == 10
    assert found.share == pytest.approx(0.6)
    assert found.alpha == pytest.approx(0.095, abs=5e-4)


def test_agreement_needs_two_who_judge_one_image() -> None:
    assert gather([Label("a", "keep", "x"), Label("b", "keep", "y")]).agreement is None
    alike = gather([Label("a", "keep", "x"), Label("a", "keep", "y")]).agreement
    assert alike is not None
    assert alike.share == 1
    assert math.isnan(alike.alpha)
    assert str(alike) == "100% on 1 images"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("image_id,colour\na,red\n", "no column names the label or rating"),
        ("colour,label\na,keep\n", "no column names the image"),
        ("image_id,label\na,keep\nb,perhaps\n", "row 3: label is 'perhaps'"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        read_labels(written(tmp_path / "labels.csv", text))


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", "picture,nice\na,keep\n")
    assert read_labels(path, id_column="picture", label_column="nice").ids == ("a",)
    with pytest.raises(UsageError, match="has no column 'other'; it has picture, nice"):
        read_labels(path, id_column="other")


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_labels(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_labels(tmp_path / "b.csv")


# The file that a review writes.


def test_labels_are_on_the_disk_at_once_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "labels.csv"
    file = LabelFile(path)
    said = [
        Label(
            name,
            "keep" if i % 2 else "drop",
            "ann",
            "2026-01-01T00:00:00+00:00",
            5.25,
            "5 to 5.5",
            40,
        )
        for i, name in enumerate(HOSTILE)
    ]
    for number, label in enumerate(said, start=1):
        file.add(label)
        with path.open(newline="", encoding="utf-8") as there:
            rows = list(csv.DictReader(there))
        assert len(rows) == number
        assert rows[-1]["image_id"] == label.image_id
        assert tuple(rows[-1]) == COLUMNS
    file.close()
    again = LabelFile(path)
    assert again.labels == said
    again.close()


@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.sampled_from(["keep", "drop", "skip", ""])),
        min_size=1,
        max_size=8,
    ),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_line_that_a_crash_cut_short_is_taken_back(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    file = LabelFile(path)
    sizes = [path.stat().st_size]
    labels = []
    for name, value in said:
        name = name.replace("\x00", "")
        name = name.encode("utf-8", "ignore").decode()
        labels.append(Label(name, value, "ann", "now", 5.0, "4 to 6", 7))
        file.add(labels[-1])
        sizes.append(path.stat().st_size)
    file.close()
    cut = data.draw(st.integers(sizes[0], sizes[-1]))
    os.truncate(path, cut)
    whole = sum(size <= cut for size in sizes) - 1
    file = LabelFile(path)
    assert file.labels == labels[:whole]
    file.add(Label("next", "keep", "ann"))
    file.close()
    assert [label.image_id for label in read_label_rows(path)[0]][whole:] == ["next"]


def test_a_cut_line_is_left_out_where_it_is_only_read(tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", 'image_id,label\na,keep\n"b')
    found = read_labels(path)
    assert found.ids == ("a",)
    assert "cut short" in found.notes[0]


def test_two_reviews_do_not_write_to_one_file(tmp_path: Path) -> None:
    file = LabelFile(tmp_path / "labels.csv")
    with pytest.raises(OutputError, match="another review is writing"):
        LabelFile(tmp_path / "labels.csv")
    file.close()
    LabelFile(tmp_path / "labels.csv").close()


def test_another_csv_file_is_not_written_to(tmp_path: Path) -> None:
    path = written(tmp_path / "accounts.csv", "date,amount\n2026-01-01,5\n")
    with pytest.raises(OutputError, match="holds something else"):
        LabelFile(path)
    assert path.read_text() == "date,amount\n2026-01-01,5\n"


def test_a_full_disk_loses_no_earlier_label(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from aesthetic_filter.errors import OutputError
from aesthetic_filter.labels import Label, LabelFile
file = LabelFile(sys.argv[1])
file.add(Label("first", "keep", "ann"))
import os
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = os.stat(sys.argv[1]).st_size + 10
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    file.add(Label("second", "keep", "ann"))
except OutputError as error:
    print(error)
"""
    path = tmp_path / "labels.csv"
    ran = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert "a label was not saved" in ran.stdout
    assert [label.image_id for label in read_label_rows(path)[0]] == ["first"]
    assert path.read_text().endswith("\n")


def test_values_are_plain_arrays(tmp_path: Path) -> None:
    found = read_labels(written(tmp_path / "l.csv", "image_id,label\na,keep\n"))
    assert found.values.dtype == np.float64
    assert len(found) == 1
