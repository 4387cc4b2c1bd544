"""The encoder's weights from the hub: fetched once, resumed, checked, then without a network.

The hub is a small server on loopback, and each use of it is a process of its own. Most tests need
bytes only, not weights; the client writes what it gets in pieces of 10 MiB, so those that look at
half a file have a larger one.
"""

from __future__ import annotations

import hashlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from aesthetic_filter.clip import weights
from aesthetic_filter.clip.weights import cached_encoder, encoder_weights, verify_encoder
from aesthetic_filter.errors import ChecksumError, DownloadError, WeightsError
from clip_weights import FULL, write_clip
from hub import Hub, hub_environment, serving, sha256

Run = Callable[..., "subprocess.CompletedProcess[str]"]

REPO = "openai/clip-vit-large-patch14"
FILE = "model.safetensors"
REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
PUBLISHED = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
OTHER = "someone/other-clip"
RESOLVE = f"/{REPO}/resolve/{REVISION}/{FILE}"
MIB = 1 << 20


@pytest.fixture(scope="session")
def some_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``some_file(bytes)``: a file of random bytes, made once for each size."""
    folder = tmp_path_factory.mktemp("bytes")

    def make(count: int) -> Path:
        path = folder / f"{count}.safetensors"
        if not path.exists():
            path.write_bytes(np.random.default_rng(count).bytes(count))
        return path

    return make


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a model of the true size, 1.2 GB."""
    return write_clip(tmp_path_factory.mktemp("full") / FILE, **FULL)


@pytest.fixture
def hub(some_file: Callable[[int], Path]) -> Iterator[Hub]:
    files: dict[str, bytes | Path] = {
        f"{REPO}/{FILE}": some_file(MIB),
        f"{OTHER}/{FILE}": b"other weights",
    }
    with serving(Hub(files, REVISION)) as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str | None]:
    return hub_environment(hub, tmp_path / "home")


@pytest.fixture
def ask(cli: Run, environment: dict[str, str | None]) -> Run:
    """Run the command line against the loopback hub, with an empty cache of its own."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return cli(*arguments, env={**environment, **env})

    return run


@pytest.fixture
def start(
    environment: dict[str, str | None], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """As ``ask``, but does not wait; what still runs in the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        wanted = {**os.environ, **environment}
        process = subprocess.Popen(
            [sys.executable, "-m", "aesthetic_filter", *map(str, arguments)],
            cwd=tmp_path,
            env={key: value for key, value in wanted.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def folder_of(kept: Path, repo: str = REPO) -> Path:
    return kept / f"models--{repo.replace('/', '--')}"


def blob_in(kept: Path, content: bytes | Path) -> Path:
    return folder_of(kept) / "blobs" / sha256(content)


def in_the_cache(kept: Path, content: Path) -> Path:
    """Lay a file into the layout of the hub's cache as the encoder; gives the blob."""
    blob = blob_in(kept, content)
    name = folder_of(kept) / "snapshots" / REVISION / FILE
    blob.parent.mkdir(parents=True)
    name.parent.mkdir(parents=True)
    shutil.copyfile(content, blob)
    name.symlink_to(f"../../blobs/{blob.name}")
    return blob


def refused(ran: subprocess.CompletedProcess[str], code: int) -> str:
    """The message of a failed run: short, without a traceback."""
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.strip().splitlines()) <= 2
    return ran.stderr


def wait_for(what: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def whole(kept: Path, content: Path) -> bool:
    """The blob holds the bytes, and nothing unfinished lies beside it."""
    blob = blob_in(kept, content)
    return blob.read_bytes() == content.read_bytes() and not [*blob.parent.glob("*.incomplete")]


# Fetching.


def test_the_first_use_downloads_and_the_second_asks_nothing(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    kept = tmp_path / "models"
    first = ask("models", "pull", "--model-dir", kept)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert hub.downloads == [f"GET {RESOLVE}"]
    assert whole(kept, some_file(MIB))
    for fact in (
        f"{REPO}: fetched",
        f"{folder_of(kept)}/snapshots/{REVISION}/{FILE}",
        "1,048,576 bytes",
        sha256(some_file(MIB)),
        REVISION,
        f"rsync -a {folder_of(kept)} ",
        "--model-dir",
    ):
        assert fact in first.stdout
    hub.requests.clear()
    for env in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = ask("models", "pull", "--model-dir", kept, **env)
        assert again.returncode == 0, again.stderr
        assert again.stdout == first.stdout.replace(": fetched", ": was here already")
    assert hub.requests == []


def test_the_hub_s_own_cache_is_the_default(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    assert ask("models", "pull").returncode == 0
    assert whole(tmp_path / "home" / "hub", some_file(MIB))
    hub.requests.clear()
    assert "was here already" in ask("models", "pull").stdout
    assert hub.requests == []


def test_the_variable_says_where_weights_and_heads_are_kept(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    from aesthetic_filter.heads import bundled_heads

    kept, other = tmp_path / "kept", tmp_path / "other"
    assert ask("models", "pull", AESTHETIC_FILTER_MODEL_DIR=str(kept)).returncode == 0
    assert whole(kept, some_file(MIB))
    assert "ok" in ask("models", "verify", AESTHETIC_FILTER_MODEL_DIR=str(kept)).stdout
    hub.files["org/head/head.safetensors"] = bundled_heads()["laion-v1"].read_bytes()
    head = f"hf://org/head/head.safetensors@{REVISION}"
    ran = ask("heads", "show", head, AESTHETIC_FILTER_MODEL_DIR=str(kept))
    assert ran.returncode == 0, ran.stderr
    assert folder_of(kept, "org/head").is_dir()
    # What is given outright comes first; an empty variable is none.
    env = {"AESTHETIC_FILTER_MODEL_DIR": str(kept)}
    assert ask("models", "pull", "--model-dir", other, **env).returncode == 0
    assert whole(other, some_file(MIB))
    assert ask("models", "pull", AESTHETIC_FILTER_MODEL_DIR="").returncode == 0
    assert whole(tmp_path / "home" / "hub", some_file(MIB))


def test_content_that_lies_on_another_server_which_gets_no_token(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    hub.elsewhere = True
    ran = ask("models", "pull", "--model-dir", "models", HF_TOKEN="hf_secret")
    assert ran.returncode == 0, ran.stderr
    assert whole(tmp_path / "models", some_file(MIB))
    assert f"GET /elsewhere/{REPO}/{FILE}" in hub.downloads
    assert hub.tokens == {"127.0.0.1"}


def test_a_hub_with_its_newer_protocol_is_asked_by_plain_http(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    # The library for it is installed; it has no notion of half a file.
    hub.headers = {"X-Xet-Hash": "f" * 64, "X-Xet-Refresh-Route": f"{hub.url}/no/such/token"}
    ran = ask("models", "pull", "--model-dir", "models")
    assert ran.returncode == 0, ran.stderr
    assert hub.downloads == [f"GET {RESOLVE}"]
    assert whole(tmp_path / "models", some_file(MIB))


def test_a_blob_that_is_a_link_to_a_store_of_many_caches(
    some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    # As the hub's client lays out what it fetched with its newer protocol: under another hash.
    blob = in_the_cache(tmp_path, some_file(MIB))
    store = tmp_path / "blobs" / "ee" / ("e" * 64)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(f"../../blobs/ee/{store.name}")
    assert encoder_weights(model_dir=tmp_path).sha256 == sha256(some_file(MIB))
    with store.open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(ChecksumError, match=re.escape(str(blob))):
        encoder_weights(model_dir=tmp_path)


# Downloads that break.


def test_a_killed_download_goes_on_where_it_stood(
    ask: Run,
    start: Callable[..., subprocess.Popen[str]],
    hub: Hub,
    some_file: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    content, kept = some_file(45 * MIB), tmp_path / "models"
    hub.content = content
    hub.stalls_at = 25 * MIB
    beside = Path(f"{blob_in(kept, content)}.incomplete")
    first = start("models", "pull", "--model-dir", kept)
    wait_for(lambda: beside.exists() and beside.stat().st_size == 20 * MIB)
    first.send_signal(signal.SIGKILL)
    first.wait()
    hub.go_on.set()
    assert not blob_in(kept, content).exists()
    assert beside.read_bytes() == content.read_bytes()[: 20 * MIB]
    nothing = ask("models", "verify", "--model-dir", kept)
    assert "models pull" in refused(nothing, 1)

    hub.stalls_at = None
    hub.requests.clear()
    hub.sent.clear()
    second = ask("models", "pull", "--model-dir", kept)
    assert second.returncode == 0, second.stderr
    assert hub.downloads == [f"GET {RESOLVE} bytes={20 * MIB}-"]
    assert hub.sent == [(20 * MIB, 45 * MIB)]
    assert whole(kept, content)


def test_a_server_that_cannot_send_a_part_sends_it_all_again(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    content, kept = some_file(25 * MIB), tmp_path / "models"
    hub.content = content
    hub.ranges = False
    blob = blob_in(kept, content)
    blob.parent.mkdir(parents=True)
    Path(f"{blob}.incomplete").write_bytes(b"half of something else")
    ran = ask("models", "pull", "--model-dir", kept)
    assert ran.returncode == 0, ran.stderr
    assert hub.sent == [(0, 25 * MIB)]
    assert whole(kept, content)


@pytest.mark.parametrize("left", [MIB, MIB + 5])
def test_as_much_as_there_should_be_lies_there_already(
    left: int, ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    content, kept = some_file(MIB), tmp_path / "models"
    blob = blob_in(kept, content)
    blob.parent.mkdir(parents=True)
    # Killed before it got its name; or something that cannot be a part of the file.
    Path(f"{blob}.incomplete").write_bytes((content.read_bytes() + b"extra")[:left])
    ran = ask("models", "pull", "--model-dir", kept)
    assert ran.returncode == 0, ran.stderr
    assert len(hub.downloads) == (0 if left == MIB else 1)
    assert whole(kept, content)


def test_a_connection_that_breaks_and_comes_back(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    content = hub.content = some_file(45 * MIB)  # type: ignore[assignment]
    hub.breaks_at = [25 * MIB, 12 * MIB]
    ran = ask("models", "pull", "--model-dir", "models")
    assert ran.returncode == 0, ran.stderr
    starts = [start for start, _ in hub.sent]
    assert starts == [0, 20 * MIB, 30 * MIB]
    assert whole(tmp_path / "models", content)


def test_a_connection_that_does_not_come_back(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    content, kept = some_file(25 * MIB), tmp_path / "models"
    hub.content = content
    hub.breaks_at = [12 * MIB, *[0] * 20]
    ran = ask("models", "pull", "--model-dir", kept)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "the download broke off" in ran.stderr
    assert "goes on from there" in ran.stderr
    hub.breaks_at.clear()
    hub.sent.clear()
    assert ask("models", "pull", "--model-dir", kept).returncode == 0
    assert hub.sent == [(10 * MIB, 25 * MIB)]
    assert whole(kept, content)


def test_two_processes_at_once_end_with_one_good_copy(
    start: Callable[..., subprocess.Popen[str]],
    hub: Hub,
    some_file: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    content, kept = some_file(25 * MIB), tmp_path / "models"
    hub.content = content
    hub.stalls_at = 12 * MIB
    both = [start("models", "pull", "--model-dir", kept) for _ in range(2)]
    # Both have asked what there is, and one of them is half way.
    wait_for(lambda: sum(r.startswith("HEAD ") for r in hub.requests) >= 2 and bool(hub.sent))
    time.sleep(0.5)
    hub.go_on.set()
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert sha256(content) in out
    assert hub.sent == [(0, 25 * MIB)]  # only one of them
    assert whole(kept, content)


def test_content_that_is_not_what_the_hub_announced_is_refused(
    ask: Run, hub: Hub, tmp_path: Path
) -> None:
    hub.announced = hashlib.sha256(b"what was published").hexdigest()
    for _ in range(2):
        message = refused(ask("models", "pull", "--model-dir", "models"), 2)
        assert f"hf://{REPO}/{FILE}@{REVISION}: its checksum is" in message
        assert f"the hub said {hub.announced[:12]}" in message
    blobs = folder_of(tmp_path / "models") / "blobs"
    assert not [path for path in blobs.iterdir() if path.stat().st_size]
    hub.announced = ""
    assert ask("models", "pull", "--model-dir", "models").returncode == 0


@pytest.mark.parametrize(
    "env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=["down", "offline"]
)
def test_a_hub_out_of_reach_names_the_three_ways_out(
    env: dict[str, str], ask: Run, hub: Hub, tmp_path: Path
) -> None:
    began = time.monotonic()
    message = refused(ask("models", "pull", "--model-dir", tmp_path / "models", **env), 1)
    assert time.monotonic() - began < 20
    assert f"not in {tmp_path / 'models'}" in message
    assert "the hub cannot be reached" in message
    assert "(1) run `aesthetic-filter models pull --model-dir DIR` where there is a" in message
    assert "copy DIR here" in message
    assert "(2) give such a DIR as --model-dir (or AESTHETIC_FILTER_MODEL_DIR)" in message
    assert "(3) score existing embeddings instead of images" in message
    assert hub.requests == []


def test_a_folder_that_cannot_be_written_is_not_blamed_on_the_network(
    ask: Run, tmp_path: Path
) -> None:
    (tmp_path / "models").touch()
    ran = ask("models", "pull", "--model-dir", tmp_path / "models" / "in-a-file")
    assert "cannot be kept in" in refused(ran, 1)
    assert "Not a directory" in ran.stderr


# The progress bar.


def on_a_terminal(arguments: list[str], env: dict[str, str | None], cwd: Path) -> str:
    """What a run writes to a standard error that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))  # in none a bar has no room
    wanted = {**os.environ, **env}
    process = subprocess.Popen(
        [sys.executable, "-m", "aesthetic_filter", *arguments],
        cwd=cwd,
        env={key: value for key, value in wanted.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not data:
            break
        said += data
    os.close(ours)
    assert process.wait(timeout=60) == 0, said
    return said.decode()


@pytest.mark.parametrize(
    ("options", "off", "shown"),
    [([], None, True), (["--quiet"], None, False), ([], "1", False)],
    ids=["a terminal", "--quiet", "HF_HUB_DISABLE_PROGRESS_BARS"],
)
def test_a_bar_on_a_terminal_only(
    options: list[str],
    off: str | None,
    shown: bool,
    environment: dict[str, str | None],
    tmp_path: Path,
) -> None:
    env = {**environment, "HF_HUB_DISABLE_PROGRESS_BARS": off}
    said = on_a_terminal(["models", "pull", *options], env, tmp_path)
    assert (FILE in said and "100%" in said) == shown
    assert shown or said == ""


def test_no_bar_where_standard_error_is_no_terminal(
    cli: Run, environment: dict[str, str | None]
) -> None:
    ran = cli("models", "pull", env={**environment, "HF_HUB_DISABLE_PROGRESS_BARS": None})
    assert (ran.returncode, ran.stderr) == (0, "")


# Checking again.


def test_verify_reads_everything_again(
    ask: Run, hub: Hub, some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    kept = tmp_path / "models"
    message = refused(ask("models", "verify", "--model-dir", kept), 1)
    assert f"the CLIP encoder is not in {kept}" in message
    assert f"`aesthetic-filter models pull --model-dir {kept}`" in message
    message = refused(ask("models", "verify"), 1)
    assert "not in the hub's cache; `aesthetic-filter models pull`" in message

    hub.content = content = some_file(65 * MIB)  # type: ignore[assignment]
    assert ask("models", "pull", "--model-dir", kept).returncode == 0
    hub.requests.clear()
    good = ask("models", "verify", "--model-dir", kept)
    assert good.returncode == 0, good.stderr
    assert re.fullmatch(rf"{REPO} +ok  sha256 {sha256(content)}\n", good.stdout)
    assert hub.requests == []

    # Damage that leaves size and times as they were shows only to someone who reads it all.
    blob = blob_in(kept, content)
    before = blob.stat()
    with blob.open("r+b") as file:
        file.seek(40 * MIB)
        file.write(b"damage")
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ask("models", "pull", "--model-dir", kept).returncode == 0
    message = refused(ask("models", "verify", "--model-dir", kept), 2)
    assert f"the hub said {sha256(content)[:12]}" in message
    assert f"Delete {blob} and try again" in message
    blob.unlink()
    assert "fetched" in ask("models", "pull", "--model-dir", kept).stdout
    assert ask("models", "verify", "--model-dir", kept).returncode == 0


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed, by name."""
    names: list[str] = []
    original = hashlib.file_digest

    def counting(file, *arguments):  # type: ignore[no-untyped-def]
        names.append(Path(file.name).name)
        return original(file, *arguments)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return names


def test_a_large_file_is_hashed_once_until_it_changes(
    hashed: list[str], some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    content = some_file(65 * MIB)
    blob = in_the_cache(tmp_path, content)
    for _ in range(3):
        assert encoder_weights(model_dir=tmp_path).sha256 == sha256(content)
    assert hashed == [blob.name]
    verify_encoder(model_dir=tmp_path)
    assert hashed == [blob.name] * 2

    os.utime(blob)  # touched: looked at again, and found good
    encoder_weights(model_dir=tmp_path)
    encoder_weights(model_dir=tmp_path)
    assert hashed == [blob.name] * 3

    with blob.open("r+b") as file:
        file.write(b"damage")
    for _ in range(2):
        with pytest.raises(ChecksumError, match=f"the hub said {sha256(content)[:12]}"):
            encoder_weights(model_dir=tmp_path)


def test_a_copy_is_checked_where_it_arrives(
    hashed: list[str], some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    blob = in_the_cache(here, some_file(65 * MIB))
    encoder_weights(model_dir=here)
    subprocess.run(["cp", "-a", here, there], check=True)  # keeps the times, and the marker
    damaged = blob_in(there, some_file(65 * MIB))
    times = damaged.stat()
    with damaged.open("r+b") as file:
        file.write(b"damage")
    os.utime(damaged, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ChecksumError):
        encoder_weights(model_dir=there)
    assert hashed == [blob.name] * 2


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_read_only_cache_is_checked_each_time(
    hashed: list[str], some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    blob = in_the_cache(tmp_path, some_file(65 * MIB))
    blob.parent.chmod(0o555)
    try:
        for _ in range(2):
            encoder_weights(model_dir=tmp_path)
    finally:
        blob.parent.chmod(0o755)
    assert hashed == [blob.name] * 2


def test_a_marker_that_cannot_be_written_is_no_failure(
    hashed: list[str], some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    blob = in_the_cache(tmp_path, some_file(65 * MIB))
    blob.with_name(f"{blob.name}.checked").mkdir()
    for _ in range(2):
        encoder_weights(model_dir=tmp_path)
    assert hashed == [blob.name] * 2


# Other places that weights come from.


def test_a_plain_folder_is_taken_for_a_file_of_one_s_own(
    some_file: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(some_file(MIB), tmp_path / FILE)
    found = encoder_weights(model_dir=tmp_path)
    assert found == weights.Weights(
        tmp_path / FILE, FILE, None, sha256(some_file(MIB)), published=False
    )
    with pytest.raises(ChecksumError, match="damaged, or other weights"):
        verify_encoder(model_dir=tmp_path)
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", str(tmp_path))
    assert encoder_weights() == found
    # What the hub vouches for comes first.
    in_the_cache(tmp_path, some_file(2 * MIB))
    assert encoder_weights().sha256 == sha256(some_file(2 * MIB))


def test_a_copy_is_known_by_its_checksum(
    some_file: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weights.ENCODER_SHA256 == PUBLISHED
    digest = sha256(some_file(MIB))
    monkeypatch.setattr(weights, "ENCODER_SHA256", digest)
    shutil.copyfile(some_file(MIB), tmp_path / FILE)
    found = encoder_weights(model_dir=tmp_path)
    assert found == weights.Weights(tmp_path / FILE, REPO, REVISION, digest, published=True)
    assert verify_encoder(model_dir=tmp_path) == found
    assert encoder_weights(tmp_path / FILE) == found


def test_a_copy_of_the_cache_with_files_where_links_were(
    some_file: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    in_the_cache(here, some_file(MIB))
    subprocess.run(["cp", "-rL", here, there], check=True)  # as `scp -r` does
    digest = sha256(some_file(MIB))
    with pytest.raises(ChecksumError, match="the hub said a2bf730a0c7d"):
        encoder_weights(model_dir=there)
    monkeypatch.setattr(weights, "ENCODER_SHA256", digest)
    assert cached_encoder(there) == folder_of(there) / "snapshots" / REVISION / FILE
    found = encoder_weights(model_dir=there)
    assert (found.sha256, found.name, found.published) == (digest, REPO, True)


def test_weights_of_one_s_own(some_file: Callable[[int], Path], tmp_path: Path) -> None:
    found = encoder_weights(some_file(MIB))
    assert found == weights.Weights(
        some_file(MIB), f"{MIB}.safetensors", None, sha256(some_file(MIB)), published=False
    )
    assert encoder_weights(str(some_file(MIB))) == found
    (tmp_path / "weights.pth").touch()
    for given, problem in (
        (tmp_path / "nothing.safetensors", "no such file"),
        (tmp_path, "no such file"),
        (tmp_path / "weights.pth", "not a .safetensors file"),
        ("hf://org/repo/model.safetensors", "hf://ORG/REPO/FILE@REVISION"),
    ):
        with pytest.raises(WeightsError, match=problem) as raised:
            encoder_weights(given)
        assert str(given) in str(raised.value)


def test_a_relative_path_is_good_after_a_change_of_folder(
    some_file: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_cache(tmp_path / "models", some_file(MIB))
    monkeypatch.chdir(tmp_path)
    found = encoder_weights(model_dir="models").path
    monkeypatch.chdir("/")
    assert found.is_file()


ASK = """
import sys
from aesthetic_filter.clip.weights import encoder_weights
found = encoder_weights(sys.argv[1], model_dir=sys.argv[2])
print(found.path, found.name, found.revision, found.sha256, found.published)
"""


def test_other_weights_from_the_hub(
    hub: Hub, environment: dict[str, str | None], some_file: Callable[[int], Path], tmp_path: Path
) -> None:
    kept = tmp_path / "models"

    def ask_for(address: str) -> list[str]:
        wanted = {**os.environ, **environment}
        ran = subprocess.run(
            [sys.executable, "-c", ASK, address, str(kept)],
            env={key: value for key, value in wanted.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()

    digest = hashlib.sha256(b"other weights").hexdigest()
    path = folder_of(kept, OTHER) / "snapshots" / REVISION / FILE
    expected = [str(path), f"{OTHER}/{FILE}", "main", digest, "False"]
    assert ask_for(f"hf://{OTHER}/{FILE}@main") == expected
    assert path.read_bytes() == b"other weights"
    # A small file that is kept in git itself has another hash on the hub.
    hub.announced = hashlib.sha1(b"blob 13\0other weights", usedforsecurity=False).hexdigest()
    shutil.rmtree(kept)
    assert ask_for(f"hf://{OTHER}/{FILE}@main") == expected
    # The published encoder is that under whichever spelling.
    hub.announced = ""
    found = ask_for(f"hf://{REPO}/{FILE}@{REVISION}")
    assert found[1:] == [REPO, REVISION, sha256(some_file(MIB)), "True"]


def test_nothing_is_fetched_to_find_out_that_nothing_is_here(tmp_path: Path) -> None:
    assert cached_encoder(tmp_path) is None
    with pytest.raises(DownloadError, match="models pull --model-dir"):
        verify_encoder(model_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# The true size.

MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "aesthetic_filter", *sys.argv[1:]], check=True)
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_the_true_size_is_fetched_and_checked_in_little_memory(
    hub: Hub, full: Path, environment: dict[str, str | None], tmp_path: Path
) -> None:
    hub.content = full  # type: ignore[assignment]
    assert full.stat().st_size > 1.2e9
    wanted = {**os.environ, **environment}

    def peak(*arguments: object) -> tuple[int, str]:
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, *map(str, arguments)],
            cwd=tmp_path,
            env={key: value for key, value in wanted.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ran.returncode == 0, ran.stderr
        out, _, kilobytes = ran.stdout.partition("PEAK ")
        return int(kilobytes) // (1024 if sys.platform == "linux" else 1024 * 1024), out

    memory, out = peak("models", "pull", "--model-dir", "models")
    assert sha256(full) in out
    assert memory < 400
    blob = blob_in(tmp_path / "models", full)
    assert blob.stat().st_size == full.stat().st_size
    memory, out = peak("models", "verify", "--model-dir", "models")
    assert out.split()[1:] == ["ok", "sha256", sha256(full)]
    assert memory < 400
