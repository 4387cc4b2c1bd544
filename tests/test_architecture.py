"""The structure that docs/design.md promises: who imports what, and what loads when."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import aesthetic_filter

PACKAGE = Path(aesthetic_filter.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

ONLY_IN = {
    "fsspec": {"storage.py"},
    "duckdb": {"database.py"},
    "huggingface_hub": {"clip/weights.py"},
    "numba": {"kernels_numba.py"},
    "llvmlite": {"kernels_llvm.py"},
    "safetensors": {"heads/", "clip/tower.py"},
    "PIL": {"clip/preprocess.py"},
    "torch": {
        "heads/convert.py",
        "heads/torch_scores.py",
        "heads/head.py",
        "clip/tower.py",
        "clip/encoder.py",
        "clip/reward.py",
    },
    "typer": {"cli/"},
    "rich": {"cli/"},
    "ray": {"backends/ray.py"},
    "jinja2": {"pages/__init__.py", "review/app.py"},
    "fastapi": {"review/app.py"},
    "uvicorn": {"review/app.py"},
    "sklearn": {"calibrate.py", "train.py"},
    "scipy": {"train.py"},
}
"""Libraries, and the only files or folders that may import them."""

HEAVY = (
    *("numpy", "pyarrow", "PIL", "torch", "numba", "duckdb", "ray"),
    *("sklearn", "scipy", "fastapi", "jinja2"),
)
DEPENDENCIES = {*ONLY_IN, "numpy", "pyarrow"}


@dataclass(frozen=True)
class Import:
    """One import of a module.

    Attributes:
        module: the dotted name, absolute.
        line: where.
        for_types: whether only a type checker sees it.
        at_module_level: whether it runs when the module is imported.
    """

    module: str
    line: int
    for_types: bool
    at_module_level: bool

    @property
    def library(self) -> str:
        return self.module.partition(".")[0]


def imports(relative: str) -> list[Import]:
    tree = ast.parse((PACKAGE / relative).read_text(encoding="utf-8"))
    return list(_walk(tree, for_types=False, at_module_level=True))


def _walk(node: ast.AST, *, for_types: bool, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, for_types, at_module_level)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield Import(name, child.lineno, for_types, at_module_level)
        else:
            checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(
                child,
                for_types=for_types or checking,
                at_module_level=at_module_level and not inside,
            )


def test_the_walk_sees_what_it_should() -> None:
    found = {(i.module, i.for_types, i.at_module_level) for i in imports("heads/head.py")}
    assert ("torch", True, True) in found
    assert ("safetensors.numpy.save", False, False) in found
    assert ("numpy", False, True) in found
    assert len(MODULES) > 25


@pytest.mark.parametrize("relative", MODULES)
def test_libraries_are_imported_where_they_belong(relative: str) -> None:
    for found in imports(relative):
        allowed = ONLY_IN.get(found.library)
        if allowed is not None:
            belongs = any(
                relative == a or (a[-1] == "/" and relative.startswith(a)) for a in allowed
            )
            assert belongs, f"{relative}:{found.line} imports {found.module}"
        known = found.library in DEPENDENCIES or found.library == "aesthetic_filter"
        known = known or found.library in sys.stdlib_module_names
        assert known, f"{relative}:{found.line} imports {found.module}, which is no dependency"


LATE = {
    "clip/tower.py",
    "clip/reward.py",
    "clip/preprocess.py",
    "backends/ray.py",
    "review/app.py",
}
"""Modules that load torch, Pillow, Ray or FastAPI, and are loaded only when they are needed."""


def test_torch_and_pillow_are_imported_only_when_they_are_needed() -> None:
    for relative in MODULES:
        for found in imports(relative):
            late = found.for_types or not found.at_module_level
            if found.library in ("torch", "PIL", "ray", "fastapi", "uvicorn", "sklearn", "scipy"):
                assert late or relative in LATE, f"{relative}:{found.line}"
            name = found.module.removeprefix("aesthetic_filter.").replace(".", "/")
            if any(name.startswith(module.removesuffix(".py")) for module in LATE):
                assert late or relative in LATE, f"{relative}:{found.line}"
    assert all(i.for_types for i in imports("heads/head.py") if i.library == "torch")


def ours(relative: str, *, at_module_level: bool | None = None) -> list[str]:
    return [
        found.module
        for found in imports(relative)
        if found.library == "aesthetic_filter"
        and not found.for_types
        and at_module_level in (None, found.at_module_level)
    ]


def test_errors_import_nothing_of_the_package() -> None:
    assert ours("errors.py") == []
    assert {found.library for found in imports("errors.py")} <= {"__future__"}


def test_kernels_import_nothing_of_the_package_until_there_are_rows() -> None:
    assert ours("kernels.py", at_module_level=True) == []
    assert set(ours("kernels.py")) == {
        "aesthetic_filter.kernels_llvm",
        "aesthetic_filter.kernels_numba",
    }


@pytest.mark.parametrize(
    ("relative", "may_import"),
    [
        ("__init__.py", ()),
        ("__main__.py", ("cli",)),
        ("table.py", ("errors",)),
        ("storage.py", ("errors", "filenames")),
        ("kernels_llvm.py", ("kernels",)),
        ("kernels_numba.py", ("kernels",)),
        ("heads/", ("heads", "kernels", "errors", "clip", "whole")),
        ("clip/weights.py", ("errors",)),
        ("clip/tower.py", ("errors",)),
        ("clip/preprocess.py", ("errors", "kernels_numba")),
        ("clip/encoder.py", ("errors", "clip", "kernels")),
        ("filenames.py", ()),
        ("whole.py", ()),
        ("journal.py", ("clip", "table")),
        ("images.py", ("table", "errors")),
        ("scoring.py", ("heads", "table")),
        ("progress.py", ("formats", "table")),
        ("steps.py", ("guard", "heads", "scoring", "table", "errors")),
        (
            "embedding.py",
            ("clip", "formats", "images", "journal", "storage", "table", "errors"),
        ),
        (
            "stages.py",
            (
                *("clip", "embedding", "formats", "heads", "images", "scoring", "selection"),
                *("steps", "storage", "table", "errors"),
            ),
        ),
        ("identity.py", ()),
        ("arrangement.py", ("identity", "stages", "steps", "table", "errors")),
        (
            "backends/",
            (
                *("backends", "clip", "embedding", "formats", "heads", "journal", "kernels"),
                *("prefetch", "progress", "run_folder", "scoring", "stages", "steps", "storage"),
                *("table", "errors"),
            ),
        ),
        ("result.py", ("progress", "steps", "table")),
        ("archive.py", ("formats", "storage", "filenames", "errors")),
        (
            "formats/",
            ("formats", "archive", "table", "storage", "prefetch", "filenames", "errors"),
        ),
        ("guard.py", ("heads", "formats", "storage", "table", "errors")),
        ("interval.py", ()),
        ("labels.py", ("formats", "table", "errors")),
        ("sampling.py", ("database", "table")),
        ("calibrate.py", ("database", "interval", "table", "errors")),
        ("train.py", ("heads", "interval", "errors")),
        ("stored.py", ("formats", "run_folder", "storage", "table", "errors")),
        ("own_head.py", ("calibrate", "heads", "stored", "table", "train", "errors")),
        (
            "pictures.py",
            (
                *("clip", "formats", "run_folder", "selection", "storage"),
                *("table", "errors"),
            ),
        ),
        ("pages/", ()),
        (
            "report.py",
            (
                *("calibrate", "clip", "database", "heads", "pages", "pictures", "prefetch"),
                *("run_folder", "sampling", "table", "whole", "errors"),
            ),
        ),
        ("compare.py", ("database", "pages", "report", "table", "errors")),
        ("review/session.py", ("calibrate", "labels", "sampling", "errors")),
        (
            "review/app.py",
            ("calibrate", "pages", "pictures", "review", "sampling", "table", "errors"),
        ),
    ],
)
def test_the_lower_modules_know_nothing_of_the_upper_ones(
    relative: str, may_import: tuple[str, ...]
) -> None:
    modules = [m for m in MODULES if m == relative or (relative[-1] == "/" and relative in m)]
    assert modules
    for module in modules:
        # The package's own __init__ resolves its names by text, so that nothing loads.
        for name in ours(module):
            part = name.split(".")[1]
            assert part in may_import, f"{module} imports {name}"


@pytest.mark.parametrize("relative", [m for m in MODULES if not m.startswith("cli/")])
def test_only_the_command_line_prints_or_exits(relative: str) -> None:
    tree = ast.parse((PACKAGE / relative).read_text(encoding="utf-8"))
    forbidden = {"print", "exit", "quit", "breakpoint", "sys.exit", "os._exit", "os.abort"}
    streams = ("sys.stdout", "sys.stderr")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            bad = called in forbidden or called.startswith(streams)
            assert not bad, f"{relative}:{node.lineno} calls {called}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = ast.unparse(node.exc)
            assert not raised.startswith("SystemExit"), f"{relative}:{node.lineno}"


def loaded(*command: str) -> set[str]:
    """The modules that a process has loaded by the time it ends."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', *sorted(sys.modules), file=sys.stderr))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program + command[0], *command[1:]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stderr.rpartition("LOADED")[2].split())


HELP = "import sys; sys.argv[0] = 'aesthetic-filter'; from aesthetic_filter.cli import main; main()"


@pytest.mark.parametrize(
    "command",
    [
        ("import aesthetic_filter",),
        ("import aesthetic_filter; dir(aesthetic_filter); aesthetic_filter.__version__",),
        (HELP, "--help"),
        (HELP, "score", "--help"),
        (HELP, "filter", "--help"),
        (HELP, "report", "--help"),
        (HELP, "review", "--help"),
        (HELP, "calibrate", "--help"),
        (HELP, "train", "--help"),
        (HELP, "heads", "--help"),
        (HELP, "heads", "convert", "--help"),
    ],
    ids=lambda command: " ".join(("help" if command[0] == HELP else command[0], *command[1:])),
)
def test_nothing_heavy_loads_before_it_is_used(command: tuple[str, ...]) -> None:
    modules = loaded(*command)
    assert "aesthetic_filter" in modules
    assert not modules & {*HEAVY, "fsspec", "safetensors", "huggingface_hub"}


def test_scoring_a_few_rows_loads_neither_torch_nor_the_compiler() -> None:
    modules = loaded(
        "import numpy, warnings, aesthetic_filter as af; warnings.simplefilter('ignore');"
        "af.load_head()(numpy.ones((100, 768), 'f4'))"
    )
    assert "numpy" in modules
    assert not modules & {"torch", "numba", "llvmlite", "duckdb", "pyarrow", "huggingface_hub"}


def test_the_public_names_resolve_and_match() -> None:
    assert len(set(aesthetic_filter.__all__)) == len(aesthetic_filter.__all__)
    for name in aesthetic_filter.__all__:
        found = getattr(aesthetic_filter, name)
        assert found.__doc__, f"{name} has no docstring"
        assert found.__module__.startswith("aesthetic_filter."), name
    assert set(aesthetic_filter.__all__) <= set(dir(aesthetic_filter))
    # What type checkers see is what there is.
    shown = {
        found.module.rpartition(".")[2]: found.module
        for found in imports("__init__.py")
        if found.for_types
    }
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    names = {
        alias.asname
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert names == set(aesthetic_filter.__all__)
    assert all(module.startswith("aesthetic_filter.") for module in shown.values())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = aesthetic_filter.nothing


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from aesthetic_filter import *", names)
    names.pop("__builtins__")
    assert set(names) == set(aesthetic_filter.__all__)


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert aesthetic_filter.__version__ == version("aesthetic-filter")
