"""Find a head by name, path or hub address."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from aesthetic_filter.errors import HeadError
from aesthetic_filter.heads.convert import catalogue, convert
from aesthetic_filter.heads.head import Head, read_head


def load_head(spec: str | Path | None = None, *, model_dir: str | Path | None = None) -> Head:
    """Load an aesthetic head.

    Args:
        spec: a bundled head's name; the path of a head file or of a published checkpoint
            (``.safetensors``, ``.pth``); or ``hf://ORG/REPO/FILE@REVISION``. Default: the
            reference head, ``sac+logos+ava1-l14-linearMSE``.
        model_dir: where files from the hub are kept; default: the hub's own cache.

    Raises:
        HeadError: no such head, or a file that is not one.
        ChecksumError: a file whose content is not what was published.
        DownloadError: the hub cannot be reached and the file is not cached.
    """
    text = str(spec) if spec is not None else catalogue()["default"]
    if text in bundled_heads():
        return _from_file(bundled_heads()[text])
    if text.startswith("hf://"):
        return _from_file(_fetch(text, model_dir))
    path = Path(text).expanduser()
    if path.is_file():
        return _from_file(path)
    looks_like_a_path = "/" in text or path.suffix in (".safetensors", ".pth", ".pt")
    problem = "no such file" if looks_like_a_path else "no head of that name"
    raise HeadError(
        f"{text}: {problem}; the bundled heads are {', '.join(bundled_heads())}; "
        "or give a file, or hf://ORG/REPO/FILE@REVISION"
    )


def bundled_heads() -> dict[str, Path]:
    """The heads that ship with the package: name to file, the default first."""
    folder = Path(str(resources.files("aesthetic_filter"))) / "heads"
    names = {
        path.stem: path
        for path in sorted(folder.glob("*.safetensors"))
        if path.stem != "reference-direction"
    }
    default = catalogue()["default"]
    return {name: names[name] for name in sorted(names, key=lambda n: (n != default, n))}


def _from_file(path: Path) -> Head:
    if path.suffix != ".safetensors":
        return convert(path)
    return read_head(path) or convert(path)


def _fetch(address: str, model_dir: str | Path | None) -> Path:
    from aesthetic_filter.clip.weights import HUB_ADDRESS, fetch

    match = HUB_ADDRESS.fullmatch(address)
    if not match:
        raise HeadError(
            f"{address}: a head on the hub is hf://ORG/REPO/FILE@REVISION; the revision pins it"
        )
    return fetch(match["repo"], match["file"], match["revision"], model_dir=model_dir)
