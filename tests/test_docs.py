"""Documentation that can fail: every command shown is run, every help text pasted is compared."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from images import run_python, write_tar
from review_server import Server, serving

TIMING = re.compile(r"[\d.]+ s, [\d,]+ rows/s")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a documented command with this interpreter, in a folder."""
    words = shlex.split(command)
    if words[0] == "aesthetic-filter":
        words = [sys.executable, "-m", "aesthetic_filter", *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    # What the parser sees of a terminal must not depend on the one the tests run in.
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    env |= {"COLUMNS": "100"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_the_readme_tour_prints_what_it_shows(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").symlink_to(repo / "scripts")
    blocks = re.findall(r"```console\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        first, _, shown = block.partition("\n")
        result = run(first.removeprefix("$ "), tmp_path)
        assert result.returncode == 0, result.stderr
        printed = result.stdout.replace(str(tmp_path), "/home/you")
        assert TIMING.sub("TIMING", printed) == TIMING.sub("TIMING", shown)


def test_the_commands_for_images_run(
    repo: Path, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [sys.executable, str(repo / "scripts/make_pictures.py"), "photos"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", str(model_dir))
    (block,) = re.findall(r"```sh\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        result = run(line.partition("#")[0].strip(), tmp_path)
        assert result.returncode == 0, result.stderr
    kept = sorted(path.name for path in (tmp_path / "best").glob("*.jpg"))
    assert kept == [f"{number:02d}.jpg" for number in range(12)]
    assert (tmp_path / "best" / "00.jpg").samefile(tmp_path / "photos" / "00.jpg")


def test_the_way_to_a_threshold_runs(
    repo: Path, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From unlabelled images to a calibrated threshold, and to a head of one's own."""
    script = [sys.executable, str(repo / "scripts/make_landscapes.py"), "photos", "160"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", str(model_dir))
    blocks = re.findall(r"```bash\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    commands = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == (
        ["score", "report", "review", "calibrate", "filter", "train", "score", "compare"]
    )
    threshold = ""
    for command in commands:
        if " review " in command:
            _, _, scores, *options = shlex.split(command)
            with serving(Path(scores), tmp_path, *options) as server:
                judge_by_score(server, 100)
            continue
        command = re.sub(r"--min-score \S+", f"--min-score {threshold}", command)
        result = run(command, tmp_path)
        assert result.returncode == 0, result.stderr
        if " calibrate " in command:
            threshold = result.stdout.split("--min-score ")[1].strip()
    assert len(list((tmp_path / "best").rglob("*.jpg"))) > 5
    for page in ("report.html", "compare.html"):
        assert (tmp_path / page).read_text().startswith("<!DOCTYPE html>")


def judge_by_score(server: Server, count: int) -> None:
    """Answer so many as somebody would whom the score knows, but for a few."""
    chance = np.random.default_rng(0)
    middle = None
    for _ in range(count):
        (item,) = server.post("/api/next", count=1)["items"]
        middle = middle or item["score"]
        keep = (item["score"] > middle) is (chance.random() < 0.97)
        server.post("/api/label", key=item["key"], value="keep" if keep else "drop")


def test_every_help_text_is_the_one_pasted(repo: Path, tmp_path: Path) -> None:
    pasted = re.findall(r"```\n\$ (.*?)\n(.*?)```", (repo / "docs/cli.md").read_text(), re.DOTALL)
    for command, shown in pasted:
        printed = run(command, tmp_path).stdout.replace(
            "python -m aesthetic_filter", "aesthetic-filter"
        )
        assert printed.rstrip() == shown.rstrip(), command
    documented = {command.removesuffix(" --help") for command, _ in pasted}
    assert documented == {"aesthetic-filter", *all_commands()}


def test_every_command_is_in_the_readme(repo: Path) -> None:
    readme = (repo / "README.md").read_text()
    for command in all_commands():
        if command != "aesthetic-filter heads":
            assert f"`{command}" in readme


def test_every_selection_rule_is_in_the_readme(repo: Path) -> None:
    from aesthetic_filter.selection.rule import options

    readme = (repo / "README.md").read_text()
    assert [option.flag for option in options() if f"`{option.flag}" not in readme] == []


def test_the_layout_in_the_design_is_the_one_there_is(repo: Path) -> None:
    design = (repo / "docs/design.md").read_text()
    package = repo / "src/aesthetic_filter"
    for path in sorted([*package.glob("*.py"), *(f.parent for f in package.glob("*/__init__.py"))]):
        assert path.name in design, path.name


def test_the_python_in_the_readme_runs(
    repo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_embeddings: Callable[..., np.ndarray],
) -> None:
    code = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    script = [sys.executable, str(repo / "scripts/make_sample.py"), "embeddings"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"embeddings": make_embeddings(3)}
    exec(code[0], names)
    assert np.asarray(names["scores"]).shape == (3,)
    assert (tmp_path / "kept" / "kept.parquet").exists()


def test_the_pipeline_that_is_shown_runs(repo: Path, tmp_path: Path, model_dir: Path) -> None:
    pages = [(repo / page).read_text() for page in ("README.md", "docs/pipeline.md")]
    blocks = [re.findall(r"```py\n(.*?)```", page, re.DOTALL) for page in pages]
    code, longer = (next(b for b in found if "Pipeline([" in b) for found in blocks)
    assert longer.replace("print(pipeline.describe())\n", "") == code
    code = longer
    script = [sys.executable, str(repo / "scripts/make_pictures.py"), "photos"]
    subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    pictures = sorted((tmp_path / "photos").rglob("*.jpg"))
    tars = {
        tmp_path / f"shards/{number}.tar": [
            (picture.name, picture.read_bytes()) for picture in pictures[number::2]
        ]
        for number in range(2)
    }
    for tar, members in tars.items():
        write_tar(tar, members)
    there = {"s3://bucket/shards/*.tar": "shards/*.tar", "/models": str(model_dir)}
    for shown, real in there.items():
        assert shown in code
        code = code.replace(shown, real)
    ran = run_python(f"if __name__ == '__main__':\n{textwrap.indent(code, '    ')}", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert f"rows {len(pictures)} 100.0%" in " ".join(ran.stdout.split())
    assert "ray, 2 shards from before" in ran.stdout
    assert (tmp_path / "curated" / "00000.tar").exists()
    assert (tmp_path / "curated-scores" / "1.tar.parquet").exists()


def test_the_chart_library_is_the_published_one_and_in_the_notice(repo: Path) -> None:
    from aesthetic_filter.pages import CHARTS, CHARTS_SHA256

    path = repo / "src/aesthetic_filter/pages" / CHARTS
    assert hashlib.sha256(path.read_bytes()).hexdigest() == CHARTS_SHA256
    notice = (repo / "NOTICE").read_text()
    assert str(path.relative_to(repo)) in notice
    assert CHARTS_SHA256 in notice


def test_the_numbers_that_ship_are_in_the_notice(repo: Path) -> None:
    import tomllib

    notice = (repo / "NOTICE").read_text()
    heads = repo / "src/aesthetic_filter/heads"
    for path in heads.glob("*.safetensors"):
        assert str(path.relative_to(repo)) in notice
    catalogue = tomllib.loads((heads / "catalogue.toml").read_text())
    for checkpoint in catalogue["checkpoint"]:
        if (heads / f"{checkpoint['name']}.safetensors").exists():
            assert checkpoint["sha256"] in notice


def all_commands() -> list[str]:
    """Every command there is, as the user types it."""
    import typer

    from aesthetic_filter.cli import app

    top = typer.main.get_command(app)
    found = []
    for name, command in top.commands.items():  # type: ignore[attr-defined]
        found.append(f"aesthetic-filter {name}")
        found += [f"aesthetic-filter {name} {inner}" for inner in getattr(command, "commands", {})]
    return found
