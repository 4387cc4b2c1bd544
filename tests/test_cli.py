"""The command line: exit codes, what goes where, help, progress, and the heads commands."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import aesthetic_filter as af
from aesthetic_filter import cli as commands
from aesthetic_filter.cli.progress import Lines

REFERENCE = "sac+logos+ava1-l14-linearMSE"
BUNDLED = [REFERENCE, "ava+logos-l14-linearMSE", "laion-v1", "sac-public"]
COMMANDS = [
    *("score", "filter", "rank", "summary", "heads"),
    *("heads list", "heads show", "heads convert", "heads verify"),
]

Make = Callable[..., np.ndarray]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_embeddings: Make) -> Path:
    """Two shards of 1,000 rows, ten of them failing."""
    folder = tmp_path_factory.mktemp("cli") / "in"
    folder.mkdir()
    for number in range(2):
        vectors = make_embeddings(1000, seed=number)
        vectors[::200] = 0
        np.save(folder / f"{number}.npy", vectors)
    return folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "scores"
    af.score(source, out)
    return out


def best_first(scores: Path) -> list[tuple[float, str]]:
    rows = [row for part in scores.rglob("*.parquet") for row in pq.read_table(part).to_pylist()]
    good = [row for row in rows if row["error"] is None]
    return sorted((-row["aesthetic_score"], row["image_id"]) for row in good)


def assert_short(done: subprocess.CompletedProcess[str], *words: str, lines: int = 2) -> None:
    """One error, of a line or two, on standard error."""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= lines, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


# Exit codes.


def test_0_done_with_the_result_on_standard_output(cli: Run, source: Path, tmp_path: Path) -> None:
    done = cli("score", source, "--out", "s")
    assert done.returncode == 0
    assert done.stderr == ""
    words = " ".join(done.stdout.split())
    assert "s: 2,000 rows in 2 shards scored 1,990 failed 10" in words
    assert "next: aesthetic-filter summary s" in words
    assert (tmp_path / "s" / "0.npy.parquet").exists()


def test_1_a_broken_shard(cli: Run, make_embeddings: Make, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", make_embeddings(10))
    os.truncate(tmp_path / "in" / "a.npy", 5000)
    done = cli("score", "in", "--out", "s")
    assert done.returncode == 1
    assert_short(done, "aesthetic-filter: a.npy: ", "cut short")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("score nowhere --out s", "nowhere: there is nothing there"),
        ("score {source} --out s --format tiff", "there is no format 'tiff'; there are:"),
        ("score {source} --out s --format parquet", "(.npy) as parquet; formats: "),
        ("score {source} --out s --head nosuch", "the bundled heads are"),
        ("score {source} --out s --head hf://a/b", "hf://ORG/REPO/FILE@REVISION"),
        ("score {source} --out s3://bucket/s", "written to a local folder"),
        ("filter nowhere --out k --top 1", "nowhere: there is nothing there"),
        ("filter {scores} --out k", "a selection needs at least one rule"),
        ("filter {scores} --out k --top many", "--top takes a whole number"),
        ("filter {scores} --out k --top 0%", "--top takes a share"),
        ("filter {scores} --out k --min-score high", "--min-score takes a number, not 'high'"),
        ("filter {scores} --out k --sample 0", "--sample takes a whole number"),
        ("filter {scores} --out k --top 1 --per nosuch", "there are: image_id, aesthetic_score"),
        ("filter {scores} --out k --min-score 5 --per error", "--per goes with --top or --sample"),
        ("filter {scores} --out k --top 1 --as xlsx", "'xlsx'; there are: csv"),
        ("filter {scores} --out {scores} --top 1", "scores"),
        ("filter {scores} --out k --where nosuch>1", "image_id, aesthetic_score"),
        ("rank nowhere", "nowhere: there is nothing there"),
        ("summary {source}", "holds no scores"),
        ("heads show nosuch", "the bundled heads are"),
        ("heads convert nowhere.pth --out h.safetensors", "nowhere.pth"),
        ("heads verify nowhere.pth", "nowhere.pth"),
    ],
)
def test_2_a_wrong_argument_or_path(
    cli: Run, source: Path, scores: Path, tmp_path: Path, arguments: str, says: str
) -> None:
    done = cli(*shlex.split(arguments.format(source=source, scores=scores)))
    assert done.returncode == 2
    assert_short(done, "aesthetic-filter: ", says, lines=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("score in", "Missing option '--out'"),
        ("score", "Missing argument"),
        ("nosuch", "No such command 'nosuch'"),
        ("rank s -n 0", "'-n'"),
        ("rank s --best", "No such option"),
        ("score in --out s --workers none", "'--workers'"),
    ],
)
def test_2_a_wrong_use(cli: Run, arguments: str, says: str) -> None:
    done = cli(*arguments.split())
    assert done.returncode == 2
    assert_short(done, "Usage: ", " -h' for help", says, lines=5)


def test_3_finished_but_for_broken_shards(cli: Run, make_embeddings: Make, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "in" / f"{name}.npy", make_embeddings(10))
    (tmp_path / "in" / "b.npy").write_bytes(b"no array")
    done = cli("score", "in", "--out", "s", "--keep-going")
    assert done.returncode == 3
    assert "10 rows in 1 shard\n" in done.stdout
    assert "broken shard b.npy: not a .npy file" in done.stderr
    assert "1 shard(s) could not be read" in done.stderr


def test_4_not_what_the_head_was_trained_on(cli: Run, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    np.save(tmp_path / "b32.npy", chance.standard_normal((5, 512)).astype(np.float32))
    np.save(tmp_path / "other.npy", chance.standard_normal((5, 768)).astype(np.float32))
    np.save(tmp_path / "int.npy", np.ones((5, 768), np.int32))
    for file, words in {
        "b32.npy": ("512", "ViT-B/32", "768"),
        "other.npy": ("5 of 5 rows", "--allow-foreign"),
        "int.npy": ("int32", "float16"),
    }.items():
        done = cli("score", file, "--out", "s")
        assert done.returncode == 4
        assert_short(done, *words)
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory, make_embeddings: Make) -> Path:
    """A hundred shards that take a while; hard links to one file."""
    folder = tmp_path_factory.mktemp("long")
    np.save(folder / "000.npy", make_embeddings(12_000))
    for number in range(1, 100):
        os.link(folder / "000.npy", folder / f"{number:03}.npy")
    return folder


def start(*arguments: object, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "aesthetic_filter", *map(str, arguments)],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def test_130_interrupted(long_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start("score", long_source, "--out", out, "--workers", 1, **pipes) as process:
        while not list(out.glob("*.parquet")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert printed == b""
    assert re.fullmatch(
        r"aesthetic-filter: interrupted; \d+ of 100 shards are finished and whole; "
        r"the same command goes on from there\n",
        errors.decode(),
    )
    assert list(out.rglob("*.unfinished")) == []


def test_the_help_documents_the_exit_codes(cli: Run) -> None:
    text = " ".join(cli("--help").stdout.split())
    assert re.findall(r"[:;] (\d+) ", text.partition("Exit codes")[2]) == [
        *("0", "1", "2", "3", "4", "130")
    ]


# Help, version, and the ways in.


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli: Run, command: str) -> None:
    done = cli(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Usage: " in done.stdout
    assert f" {command} " in done.stdout


def test_no_arguments_show_the_help(cli: Run) -> None:
    done = cli()
    assert "Commands:" in done.stdout + done.stderr
    for command in ("score", "filter", "rank", "summary", "heads"):
        assert f"  {command} " in done.stdout + done.stderr


def test_the_version(cli: Run) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout.strip()) == (0, version("aesthetic-filter"))


def test_the_installed_command_is_the_module(cli: Run) -> None:
    script = Path(sys.executable).with_name("aesthetic-filter")
    if not script.exists():
        pytest.skip("the package's script is not installed beside this python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == cli("--version").stdout


# What is printed.


def test_quiet_prints_nothing(cli: Run, source: Path, tmp_path: Path) -> None:
    done = cli("score", source, "--out", "s", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = cli("filter", "s", "--out", "k", "--top", "10", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert pq.read_metadata(tmp_path / "k" / "kept.parquet").num_rows == 10


def test_rank_lists_the_best_first(cli: Run, scores: Path) -> None:
    best = best_first(scores)
    done = cli("rank", scores, "-n", 7)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["rank", "score", "image_id"]
    assert [(int(a), float(b), c) for a, b, c in lines[1:]] == [
        (place, pytest.approx(-score, abs=5.1e-5), image_id)
        for place, (score, image_id) in enumerate(best[:7], 1)
    ]
    worst = cli("rank", scores, "--worst", "-n", 1).stdout.splitlines()[1].split()
    assert worst[2] == best[-1][1]
    found = json.loads(cli("rank", scores, "-n", 3, "--json").stdout)
    assert [row["image_id"] for row in found] == [image_id for _, image_id in best[:3]]
    assert [row["aesthetic_score"] for row in found] == [-score for score, _ in best[:3]]


def test_summary_prints_text_or_json(cli: Run, scores: Path) -> None:
    done = cli("summary", scores)
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    assert "rows 2,000 scored 1,990 99.5% failed 10 0.5%" in words
    assert "embedding is all zeros 10" in words
    assert REFERENCE in words
    found = json.loads(cli("summary", scores, "--json").stdout)
    assert (found["rows"], found["scored"]) == (2000, 1990)
    best = best_first(scores)
    assert found["percentiles"]["0.5"] == -best[len(best) - 995][0]
    assert found["provenance"]["head"]["name"] == REFERENCE


def test_filter_prints_what_adds_up_and_where_it_went(
    cli: Run, scores: Path, tmp_path: Path
) -> None:
    done = cli("filter", scores, "--out", "k", "--top", "1%", "--as", "csv", "--with-dropped")
    assert (done.returncode, done.stderr) == (0, "")
    words = " ".join(done.stdout.split())
    for line in ("rows 2,000", "kept 20 1.0%", "dropped 1,970", "top 1% 1,970", "failed 10"):
        assert line in words
    assert "written to k/kept.csv" in words
    with (tmp_path / "k" / "kept.csv").open(newline="") as file:
        kept = {row["image_id"] for row in csv.DictReader(file)}
    assert kept == {image_id for _, image_id in best_first(scores)[:20]}
    assert sorted(p.name for p in (tmp_path / "k").iterdir()) == [
        *("_selection.json", "dropped.csv", "failed.csv", "kept.csv")
    ]


@pytest.mark.parametrize(("rule", "what"), [("99", "nothing"), ("-99", "everything")])
def test_rules_that_change_nothing_are_pointed_out(
    cli: Run, tmp_path: Path, make_embeddings: Make, rule: str, what: str
) -> None:
    np.save(tmp_path / "a.npy", make_embeddings(5))
    af.score(tmp_path / "a.npy", tmp_path / "s")
    done = cli("filter", "s", "--out", "k", "--min-score", rule)
    assert done.returncode == 0
    assert f"these rules keep {what}" in done.stderr
    assert "aesthetic-filter summary s" in done.stderr


def test_scores_that_are_not_complete_are_pointed_out(
    cli: Run, tmp_path: Path, source: Path
) -> None:
    out = tmp_path / "s"
    af.score(source, out)
    facts = json.loads((out / "_run.json").read_text(encoding="utf-8"))
    (out / "_run.json").write_text(json.dumps({**facts, "status": "running"}), encoding="utf-8")
    for command in (("rank", "s"), ("filter", "s", "--out", "k", "--top", "3")):
        done = cli(*command)
        assert done.returncode == 0
        assert "s is not complete" in done.stderr


def test_seeds_and_rules_combine(cli: Run, scores: Path, tmp_path: Path) -> None:
    rules = ["--top", "50%", "--sample", "30", "--where", "embedding_norm > 0.5"]
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = cli("filter", scores, "--out", out, "--as", "ids", "--seed", seed, *rules)
        assert done.returncode == 0, done.stderr
    a, b, c = ((tmp_path / out / "kept.txt").read_text().split() for out in "abc")
    assert len(a) == len(c) == 30
    assert a == b != c
    assert set(a) | set(c) <= {image_id for _, image_id in best_first(scores)[:995]}


@pytest.mark.parametrize("command", ["rank {scores} -n 1990", "rank {scores} --json", "--help"])
def test_a_reader_that_goes_away_is_no_error(scores: Path, command: str) -> None:
    words = shlex.join(command.format(scores=scores).split())
    pipe = f"{shlex.quote(sys.executable)} -m aesthetic_filter {words} | head -n 1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_reader_that_is_gone_already_is_no_error(scores: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with start("rank", scores, "-n", 3, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        _, errors = process.communicate(timeout=30)
    assert errors == b""


# Progress.


def progress(**facts: Any) -> af.Progress:
    usual = {"shards": 4, "reused": 0, "finished": 2, "broken": {}, "total_bytes": 1000}
    return af.Progress(**{**usual, **facts})


def test_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    show = Lines()
    show(progress(rows=10, bytes=100))
    assert capsys.readouterr() == ("", "")  # not yet
    show.EVERY = 0.0
    time.sleep(0.01)
    show(progress(rows=1_234_567, bytes=250))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(
        r"2 of 4 shards, 1,234,567 rows, [\d,]+ rows/s, about \d+ s left\n", printed.err
    )
    show(progress(rows=1, bytes=0))  # too early to tell how long it takes
    assert "left" not in capsys.readouterr().err


def test_plain_lines_where_there_is_no_terminal(long_source: Path, tmp_path: Path) -> None:
    code = "from aesthetic_filter.cli import main, progress; progress.Lines.EVERY = 0.05; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "score", str(long_source), "--out", "s"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert len(lines) >= 2
    pattern = re.compile(r"\d+ of 100 shards, [\d,]+ rows, [\d,]+ rows/s(, about [\d,]+ s left)?")
    assert all(pattern.fullmatch(line) for line in lines)
    assert "\x1b" not in done.stderr
    assert "1,200,000 rows in 100 shards" in done.stdout


def on_a_terminal(tmp_path: Path, *arguments: object) -> tuple[str, str]:
    """Run with standard error on a terminal; what goes to standard output, and to the terminal."""
    terminal, inside = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("NO_COLOR", None)
    with start(
        *arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=inside, env=environment
    ) as process:
        os.close(inside)
        shown = b""
        while True:
            try:
                piece = os.read(terminal, 65_536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            shown += piece
        os.close(terminal)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    assert process.returncode == 0
    return printed, shown.decode()


def test_a_bar_on_a_terminal(long_source: Path, tmp_path: Path) -> None:
    printed, shown = on_a_terminal(tmp_path, "score", long_source, "--out", "s")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert re.search(r"\d+%\s+\d+/100 shards\s+[\d,]+ rows, [\d,]+/s", plain)
    assert "1,200,000 rows in 100 shards" in printed
    assert "\x1b" not in printed
    shown_before, _, last = shown.rpartition("\x1b[2K")
    assert shown_before
    assert "shards" not in last  # the bar goes away in the end


def test_quiet_on_a_terminal(source: Path, tmp_path: Path) -> None:
    assert on_a_terminal(tmp_path, "score", source, "--out", "s", "--quiet") == ("", "")


# Heads.


def test_heads_list(cli: Run) -> None:
    done = cli("heads", "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == BUNDLED
    assert [line.split()[1] for line in lines] == ["Apache-2.0", "Apache-2.0", "MIT", "MIT"]


@pytest.mark.parametrize("name", BUNDLED)
def test_heads_show(cli: Run, name: str) -> None:
    done = cli("heads", "show", name)
    assert (done.returncode, done.stderr) == (0, "")
    facts = {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}
    assert facts["name"] == name
    assert facts["kind"] == "affine (folded), 768 -> 1, 769 numbers"
    assert facts["source"].startswith("https://github.com/")
    assert re.fullmatch(r"[0-9a-f]{64}", facts["checkpoint sha256"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, in ``tmp_path``: torch takes seconds to load."""
    pytest.importorskip("torch", reason="reading a .pth file takes torch")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(commands.app, [str(a) for a in arguments])


def test_heads_convert_show_and_score(
    here: Callable[..., Result], cli: Run, shared: Path, tmp_path: Path, make_embeddings: Make
) -> None:
    checkpoint = shared / "heads" / f"{REFERENCE}.pth"
    done = here("heads", "convert", checkpoint, "--out", "mine.safetensors", "--name", "mine")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("mine.safetensors: mine, folded, error ")
    assert "mine" in here("heads", "show", "mine.safetensors").stdout
    np.save(tmp_path / "a.npy", make_embeddings(50))
    assert cli("score", "a.npy", "--out", "s", "--head", "mine.safetensors").returncode == 0
    assert cli("score", "a.npy", "--out", "t").returncode == 0
    mine, bundled = (
        pq.read_table(tmp_path / out / "a.npy.parquet")["aesthetic_score"].to_numpy()
        for out in "st"
    )
    assert mine == pytest.approx(bundled, abs=1e-5)


def test_heads_convert_keeps_the_layers_of_a_network_with_activations(
    here: Callable[..., Result], shared: Path, tmp_path: Path
) -> None:
    checkpoint = shared / "heads" / "ava+logos-l14-reluMSE.pth"
    done = here("heads", "convert", checkpoint, "--out", "relu.safetensors")
    assert done.exit_code == 0, done.output
    assert "layers kept" in done.stdout
    assert "5 layers with ReLU" in here("heads", "show", "relu.safetensors").stdout
    closed = here("heads", "convert", checkpoint, "--out", "nowhere/relu.safetensors")
    assert closed.exit_code == 2
    assert "cannot be written" in closed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["relu.safetensors"]


def test_heads_verify_checks_what_is_bundled(cli: Run) -> None:
    done = cli("heads", "verify")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[: len(BUNDLED)]] == [[n, "ok"] for n in BUNDLED]


def test_heads_verify_against_a_checkpoint(here: Callable[..., Result], shared: Path) -> None:
    checkpoint = shared / "heads" / f"{REFERENCE}.pth"
    done = here("heads", "verify", checkpoint, "--rows", 2000)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{REFERENCE}: largest difference")
    assert done.stdout.rstrip().endswith("ok")
    other = here("heads", "verify", checkpoint, "--head", "laion-v1", "--rows", 2000)
    assert other.exit_code == 1
    assert "TOO LARGE" in other.stdout


def test_a_head_file_whose_numbers_were_changed_is_refused(
    cli: Run, repo: Path, tmp_path: Path
) -> None:
    data = bytearray((repo / f"src/aesthetic_filter/heads/{REFERENCE}.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(data)
    for command in (("heads", "show"), ("heads", "verify", "--head")):
        done = cli(*command, "changed.safetensors")
        assert done.returncode == 2
        assert_short(done, "changed.safetensors", "not those that were saved")
