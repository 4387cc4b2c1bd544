"""Heads: the published scores, folding, files that prove themselves, and tensors."""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from aesthetic_filter.errors import (
    AestheticFilterError,
    ChecksumError,
    HeadError,
    MissingExtraError,
    WidthError,
)
from aesthetic_filter.heads import Head, bundled_heads, convert, load_head, save_head
from aesthetic_filter.heads.convert import fold, folding_error, read_checkpoint
from aesthetic_filter.heads.head import CLIP_VIT_L_14, FACTS, read_head, reference_direction
from aesthetic_filter.heads.torch_scores import score_on_device

REFERENCE_HEAD = "sac+logos+ava1-l14-linearMSE"
RELU = "ava+logos-l14-reluMSE"

PUBLISHED = {
    REFERENCE_HEAD: "sac+logos+ava1-l14-linearMSE",
    "ava+logos-l14-linearMSE": "ava+logos-l14-linearMSE",
    "laion-v1": "sa_0_4_vit_l_14_linear",
    "sac-public": "sac_public_2022_06_29_vit_l_14_linear",
}
"""Each bundled head, and the published checkpoint that it was folded from."""

Make = Callable[..., NDArray[Any]]


def expected_scores(shared: Path, column: str) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Real vectors (18, 768), as they lie in their files, and their published scores."""
    folder = shared / "embeddings"
    with (folder / "expected_scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    vectors = [np.atleast_2d(np.load(folder / r["file"]))[int(r["row"])] for r in rows]
    return np.array(vectors, np.float32), np.array([float(r[column]) for r in rows])


def some_layers(*widths: int, seed: int = 0) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Random (weight (out, in), bias (out,)) float32, from one width to the next."""
    random = np.random.default_rng(seed)
    return [
        (
            (random.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(np.float32),
            random.standard_normal(n_out).astype(np.float32),
        )
        for n_in, n_out in itertools.pairwise(widths)
    ]


def by_hand(
    layers: list[tuple[NDArray[Any], NDArray[Any]]],
    vectors: NDArray[Any],
    *,
    relu: bool = False,
    scale: float = 1.0,
) -> NDArray[np.float64]:
    """The network on L2-normalised rows, layer by layer in float64."""
    x = vectors.astype(np.float64)
    x = scale * x / np.linalg.norm(x, axis=1, keepdims=True)
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight.astype(np.float64).T + bias
        if relu and number < len(layers) - 1:
            x = np.maximum(x, 0)
    return x[:, 0]


def state_dict(
    layers: list[tuple[NDArray[Any], NDArray[Any]]], numbers: list[int], prefix: str = "layers."
) -> dict[str, NDArray[Any]]:
    return {
        f"{prefix}{number}.{part}": array
        for number, pair in zip(numbers, layers, strict=True)
        for part, array in zip(("weight", "bias"), pair, strict=True)
    }


def save_checkpoint(state: dict[str, NDArray[Any]], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({key: torch.tensor(array) for key, array in state.items()}, path)
    return path


# The published scores.


def test_the_bundled_heads_are_the_four_affine_ones_the_default_first() -> None:
    assert list(bundled_heads()) == [
        REFERENCE_HEAD,
        "ava+logos-l14-linearMSE",
        "laion-v1",
        "sac-public",
    ]
    assert load_head().name == REFERENCE_HEAD
    for path in bundled_heads().values():
        assert path.stat().st_size < 4096


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_bundled_head_gives_the_published_scores(name: str, dtype: Any, shared: Path) -> None:
    vectors, expected = expected_scores(shared, PUBLISHED[name])
    head = load_head(name)
    assert head.affine
    scores = head(vectors.astype(dtype))
    assert scores.dtype == np.float32
    assert scores.shape == (18,)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bundled_head_needs_no_other_file_and_no_network(
    name: str, shared: Path, tmp_path: Path
) -> None:
    vectors, expected = expected_scores(shared, PUBLISHED[name])
    program = (
        "import socket, sys, json, numpy as np\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import aesthetic_filter as af\n"
        "scores = af.load_head(sys.argv[1])(np.load(sys.argv[2]))\n"
        "assert not {'torch', 'numba', 'huggingface_hub'} & set(sys.modules)\n"
        "print(json.dumps(scores.tolist()))\n"
    )
    np.save(tmp_path / "vectors.npy", vectors)
    ran = subprocess.run(
        [sys.executable, "-c", program, name, tmp_path / "vectors.npy"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    np.testing.assert_allclose(json.loads(ran.stdout), expected, rtol=0, atol=2e-5)


def test_the_relu_head_works_from_its_published_file(shared: Path) -> None:
    head = load_head(shared / "heads" / f"{RELU}.pth")
    vectors, expected = expected_scores(shared, RELU)
    assert not head.affine
    assert len(head.layers) == 5
    assert head.name == RELU
    assert head.provenance["licence"] == "Apache-2.0"
    np.testing.assert_allclose(head(vectors), expected, rtol=0, atol=2e-5)


def test_the_reference_head_tells_the_ratings_apart(shared: Path) -> None:
    files = sorted((shared / "embeddings" / "laion-rating-prototypes").glob("*.npy"))
    scores = [float(load_head()(np.load(path).reshape(-1))) for path in files]
    assert scores == sorted(scores)
    assert scores[0] == pytest.approx(1.655, abs=5e-4)
    assert scores[-1] == pytest.approx(5.747, abs=5e-4)


def test_vectors_need_not_be_normalised(make_embeddings: Make) -> None:
    head = load_head()
    unit = make_embeddings(50, dtype=np.float32)
    for norm in (0.01, 13.0, 21.0, 1e4):
        np.testing.assert_allclose(head(unit * np.float32(norm)), head(unit), atol=2e-6)


def test_one_vector_gives_one_number(make_embeddings: Make) -> None:
    head = load_head()
    vectors = make_embeddings(3)
    one = head(vectors[1])
    assert one.shape == ()
    assert one == head(vectors)[1]
    assert head(vectors[1].tolist()) == one, "a list of floats"
    assert head(vectors[:0]).shape == (0,)


def test_bad_rows_score_nan_alone(make_embeddings: Make) -> None:
    head = load_head()
    vectors = make_embeddings(5)
    expected = head(vectors)
    vectors[1], vectors[3, 9] = 0, np.nan
    found = head(vectors)
    assert np.flatnonzero(np.isnan(found)).tolist() == [1, 3]
    assert np.array_equal(found[[0, 2, 4]], expected[[0, 2, 4]])


# Immutable data.


def test_a_head_cannot_be_changed() -> None:
    weight, bias = np.ones((1, 768), np.float32), np.zeros(1, np.float32)
    facts = {"scale": "1 to 10"}
    head = Head("mine", CLIP_VIT_L_14, ((weight, bias),), facts)
    before = head.sha256
    weight[:], bias[:], facts["scale"] = 7, 7, "other"
    assert head.sha256 == before
    assert head.layers[0][0].max() == 1
    assert head.provenance["scale"] == "1 to 10"
    with pytest.raises(AttributeError):
        head.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        head.layers[0][0][0, 0] = 2
    with pytest.raises(TypeError):
        head.provenance["scale"] = "other"  # type: ignore[index]


@pytest.mark.parametrize("copy", [lambda h: pickle.loads(pickle.dumps(h)), deepcopy])
def test_a_head_survives_pickling(copy: Callable[[Head], Head], make_embeddings: Make) -> None:
    head = load_head("laion-v1")
    vectors = make_embeddings(20)
    expected = head(vectors)
    again = copy(head)
    assert (again.name, again.space, again.provenance, again.sha256) == (
        head.name,
        head.space,
        head.provenance,
        head.sha256,
    )
    assert np.array_equal(again(vectors), expected)
    with pytest.raises(ValueError, match="read-only"):
        again.layers[0][1][0] = 2
    layers = some_layers(768, 16, 1)
    relu = Head("relu", CLIP_VIT_L_14, tuple(layers))
    expected = relu(vectors)  # and again, now that its columns are at hand
    assert np.array_equal(copy(relu)(vectors), expected)


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([], "at least one layer"),
        (some_layers(768, 2), "has one output, this network has 2"),
        ([some_layers(768, 8)[0], some_layers(9, 1)[0]], "do not fit together"),
        ([(np.zeros(768), np.zeros(1))], "do not fit together"),
        ([(np.full((1, 768), np.nan), np.zeros(1))], "NaN or infinity"),
        ([(np.zeros((1, 768)), np.array([np.inf]))], "NaN or infinity"),
    ],
)
def test_a_network_that_is_no_head_is_refused(layers: Any, problem: str) -> None:
    with pytest.raises(HeadError, match=problem):
        Head("odd", CLIP_VIT_L_14, tuple(layers))


# Wrong input.


@pytest.mark.parametrize(
    ("width", "encoders"),
    [
        (512, "ViT-B/32 or ViT-B/16"),
        (1024, "ViT-H/14"),
        (1152, "SigLIP so400m"),
        (17, None),
    ],
)
@pytest.mark.parametrize("kind", ["array", "one vector", "tensor"])
def test_another_width_is_named_with_the_encoders_that_have_it(
    width: int, encoders: str | None, kind: str
) -> None:
    vectors: Any = np.ones((4, width), np.float32)
    vectors = {"array": vectors, "one vector": vectors[0], "tensor": torch.from_numpy(vectors)}[
        kind
    ]
    with pytest.raises(WidthError) as caught:
        load_head()(vectors)
    message = str(caught.value)
    assert f"have {width} values" in message.replace(",", "")
    assert "768" in message
    assert encoders is None or encoders in message
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("values", [np.ones((2, 768), np.int64), torch.ones(2, 768, dtype=int)])
def test_integers_are_refused(values: Any) -> None:
    with pytest.raises(TypeError, match="int64"):
        load_head()(values)


def test_foreign_vectors_are_scored_with_a_warning(make_embeddings: Make, shared: Path) -> None:
    head = load_head()
    text = np.load(shared / "embeddings" / "not-clip-l14-image" / "text_prompts_vit_l_14.npy")
    good = make_embeddings(3)
    with pytest.warns(UserWarning, match="2 of 2 embeddings do not look like") as caught:
        scores = head(text)
    assert caught[0].filename == __file__, "the warning points at the caller"
    _, expected = expected_scores(shared, PUBLISHED[REFERENCE_HEAD])
    np.testing.assert_allclose(scores, expected[10:12], rtol=0, atol=2e-5)
    with pytest.warns(UserWarning, match="2 of 2"):
        head(torch.from_numpy(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(np.concatenate([text.astype(np.float16), good]))  # a minority: no warning
        # A head of a space that has no known direction cannot tell.
        Head("other", "another space", load_head().layers)(text)


def test_the_reference_direction_is_the_mean_of_the_prototypes(shared: Path) -> None:
    files = sorted((shared / "embeddings" / "laion-rating-prototypes").glob("*.npy"))
    mean = np.mean([np.load(path).reshape(-1).astype(np.float64) for path in files], axis=0)
    np.testing.assert_allclose(reference_direction(), mean / np.linalg.norm(mean), atol=1e-7)
    assert np.linalg.norm(reference_direction().astype(np.float64)) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        reference_direction()[0] = 1


# Conversion.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``convert`` measure its folding error over fewer vectors."""
    few = functools.partial(folding_error, rows=200)
    monkeypatch.setattr(sys.modules["aesthetic_filter.heads.convert"], "folding_error", few)


WIDTHS = (768, 24, 12, 6, 4, 1)

LAYOUTS = {
    "linear": (WIDTHS, [0, 2, 4, 6, 7], "layers.", False),
    "relu": (WIDTHS, [0, 3, 6, 9, 11], "layers.", True),
    "no room for activations": ((768, 8, 1), [0, 1], "layers.", False),
    "another prefix": (WIDTHS, [0, 2, 4, 6, 7], "model.layers.", False),
    "no prefix": (WIDTHS, [0, 2, 4, 6, 7], "", False),
    "one numbered layer": ((768, 1), [3], "head.", False),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_reads_numbered_layers(
    layout: str, ending: str, tmp_path: Path, make_embeddings: Make
) -> None:
    widths, numbers, prefix, relu = LAYOUTS[layout]
    layers = some_layers(*widths)
    path = save_checkpoint(state_dict(layers, numbers, prefix), tmp_path / f"mine{ending}")
    head = convert(path)
    vectors = make_embeddings(40)
    assert head.affine is not relu
    assert head.name == "mine"
    expected = by_hand(layers, vectors, relu=relu)
    np.testing.assert_allclose(head(vectors), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(load_head(path)(vectors), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("flat", [True, False], ids=["(768,)", "(1, 768)"])
def test_convert_reads_a_single_layer(
    ending: str, flat: bool, tmp_path: Path, make_embeddings: Make
) -> None:
    ((weight, bias),) = some_layers(768, 1)
    vectors = make_embeddings(40)
    shaped = {
        "weight": weight[0] if flat else weight,
        "bias": bias.reshape(()) if flat else bias,
    }
    v1 = convert(save_checkpoint(shaped, tmp_path / f"v1{ending}"))
    np.testing.assert_allclose(v1(vectors), by_hand([(weight, bias)], vectors), atol=1e-5)
    # Simulacra's layout is told by its keys: it expects the embedding times the root of its width.
    state = {f"linear.{key}": array for key, array in shaped.items()}
    sac = convert(save_checkpoint(state, tmp_path / f"sac{ending}"))
    expected = by_hand([(weight, bias)], vectors, scale=np.sqrt(768))
    np.testing.assert_allclose(sac(vectors), expected, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("quick")
def test_convert_reads_a_state_dict_inside_a_training_checkpoint(tmp_path: Path) -> None:
    layers = some_layers(*WIDTHS)
    state = state_dict(layers, [0, 2, 4, 6, 7])
    inner = {key: torch.tensor(array) for key, array in state.items()}
    torch.save({"state_dict": inner, "epoch": 3}, tmp_path / "train.pth")
    weight, bias = convert(tmp_path / "train.pth").layers[0]
    unit = np.eye(768)
    expected = by_hand(layers, unit)
    np.testing.assert_allclose(weight[0] + bias[0], expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    scale=st.sampled_from([1.0, np.sqrt(768), 0.25]),
    seed=st.integers(0, 99),
)
def test_folding_is_the_network(widths: list[int], scale: float, seed: int) -> None:
    layers = some_layers(*widths, 1, seed=seed)
    weight, bias = fold(tuple(layers), scale)
    assert weight.dtype == bias.dtype == np.float32
    x = np.random.default_rng(seed).standard_normal((30, widths[0]))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    expected = by_hand(layers, x, scale=scale)
    np.testing.assert_allclose(x @ weight[0] + bias[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_layer_numbers_that_do_not_tell_ask_for_the_activation(
    ending: str, tmp_path: Path, make_embeddings: Make
) -> None:
    layers = some_layers(768, 8, 1)
    path = save_checkpoint(state_dict(layers, [0, 2]), tmp_path / f"mine{ending}")
    with pytest.raises(HeadError, match="say --activation none or --activation relu"):
        convert(path)
    with pytest.raises(HeadError, match="--activation"):
        load_head(path)
    vectors = make_embeddings(10)
    for activation in ("none", "relu"):
        expected = by_hand(layers, vectors, relu=activation == "relu")
        head = convert(path, activation=activation)
        np.testing.assert_allclose(head(vectors), expected, atol=1e-5)


@pytest.mark.usefixtures("quick")
def test_an_activation_that_the_layer_numbers_contradict_is_refused(tmp_path: Path) -> None:
    layers = some_layers(*WIDTHS)
    linear = save_checkpoint(state_dict(layers, [0, 2, 4, 6, 7]), tmp_path / "linear.pth")
    relu = save_checkpoint(state_dict(layers, [0, 3, 6, 9, 11]), tmp_path / "relu.pth")
    single = save_checkpoint(
        dict(zip(("weight", "bias"), layers[-1], strict=True)), tmp_path / "1.pt"
    )
    with pytest.raises(HeadError, match="say activation none, not relu"):
        convert(linear, activation="relu")
    with pytest.raises(HeadError, match="say activation relu, not none"):
        convert(relu, activation="none")
    with pytest.raises(HeadError, match="say activation none, not relu"):
        convert(single, activation="relu")
    with pytest.raises(HeadError, match="must be none or relu, not 'gelu'"):
        convert(linear, activation="gelu")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"visual.proj": np.zeros((4, 4), np.float32)}, "its key 'visual.proj' is in none"),
        ({"layers.0.weight": np.zeros((1, 4), np.float32)}, "lacks its weight or its bias"),
        ({}, "lacks its weight or its bias"),
        (state_dict(some_layers(768, 3), [0]), "has one output, this network has 3"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_checkpoint_of_something_else_is_refused(
    state: dict[str, Any], problem: str, ending: str, tmp_path: Path
) -> None:
    path = save_checkpoint(state, tmp_path / f"other{ending}")
    with pytest.raises(HeadError, match=problem) as caught:
        convert(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\x80\x05N.", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(
    content: bytes, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"other{ending}"
    path.write_bytes(content)
    with pytest.raises(HeadError, match=r"other\.(pth?|safetensors): not a") as caught:
        load_head(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="No such file"):
        convert(tmp_path / "gone.pth")
    with pytest.raises(HeadError, match="no such file; the bundled heads are sac"):
        load_head(tmp_path / "gone.pth")
    with pytest.raises(HeadError, match="no head of that name; the bundled heads are sac"):
        load_head("beauty")
    with pytest.raises(HeadError, match="hf://ORG/REPO/FILE@REVISION; the revision pins it"):
        load_head("hf://org/repo/model.safetensors")


class Malicious:
    """Runs a command when it is unpickled by a loader that executes what a file says."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_is_refused_and_not_executed(zipped: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "evil.pth"
    state = {"weight": Malicious(trace), "bias": torch.zeros(1)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file does harm where it is trusted"
    trace.unlink()
    for load in (convert, load_head, read_checkpoint):
        with pytest.raises(HeadError, match="not a PyTorch state dict that loads safely"):
            load(path)
    assert not trace.exists()


def test_without_torch_a_pth_file_is_answered_with_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(state_dict(some_layers(768, 1), [0]), tmp_path / "mine.pth")
    monkeypatch.setitem(sys.modules, "torch", None)  # its import now fails
    with pytest.raises(MissingExtraError) as caught:
        load_head(path)
    assert 'pip install "aesthetic-filter[clip]"' in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2
    assert load_head().affine, "the bundled heads need no torch"


# Head files.


def rebuilt(shared: Path) -> dict[str, Head]:
    heads = [convert(shared / "heads" / f"{stem}.pth") for stem in PUBLISHED.values()]
    return {head.name: head for head in heads}


def test_the_bundled_files_are_what_convert_makes_of_the_published_ones(
    shared: Path, tmp_path: Path
) -> None:
    heads = rebuilt(shared)
    assert heads.keys() == bundled_heads().keys()
    for name, path in bundled_heads().items():
        save_head(heads[name], tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes(), name


def test_the_bundled_reference_direction_can_be_rebuilt(
    shared: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repo / "scripts"))
    import build_heads

    files = sorted((shared / "embeddings" / "laion-rating-prototypes").glob("rating*.npy"))
    bundled = next(iter(bundled_heads().values())).with_name("reference-direction.safetensors")
    assert build_heads.build_reference_direction(files) == bundled.read_bytes()


def test_saving_gives_the_same_bytes_in_any_process(tmp_path: Path, shared: Path) -> None:
    checkpoint = shared / "heads" / f"{RELU}.pth"
    program = (
        "import sys; from pathlib import Path\n"
        "from aesthetic_filter.heads import convert, save_head\n"
        "save_head(convert(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    for number in range(2):
        command = [sys.executable, "-c", program, checkpoint, tmp_path / f"{number}.safetensors"]
        subprocess.run(command, check=True, timeout=60)
    first, second = (tmp_path / f"{n}.safetensors" for n in range(2))
    assert first.read_bytes() == second.read_bytes()
    again = load_head(first)
    vectors, expected = expected_scores(shared, RELU)
    np.testing.assert_allclose(again(vectors), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_says_where_the_numbers_come_from(name: str, shared: Path) -> None:
    checkpoint = shared / "heads" / f"{PUBLISHED[name]}.pth"
    with safe_open(bundled_heads()[name], "numpy") as file:
        header = file.metadata()
    assert header["name"] == name
    assert header["space"] == CLIP_VIT_L_14
    assert header["activation"] == "none"
    assert header["checkpoint"] == checkpoint.name
    assert header["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert header["source"].startswith("https://github.com/")
    assert header["licence"] in ("MIT", "Apache-2.0")
    assert "1 to 10" in header["scale"]
    assert 0 < float(header["folding_error"]) < 2e-5
    head = load_head(name)
    assert tuple(head.provenance) == FACTS
    assert all(head.provenance[key] == header[key] for key in FACTS)


@pytest.mark.usefixtures("quick")
def test_provenance_can_be_given(tmp_path: Path) -> None:
    path = save_checkpoint(state_dict(some_layers(768, 1), [0]), tmp_path / "mine.safetensors")
    given_facts = {"scale": "0 to 1", "source": "https://example.org", "licence": "CC0-1.0"}
    head = convert(path, name="another", space="my encoder", **given_facts)
    save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert (again.name, again.space) == ("another", "my encoder")
    assert {key: again.provenance[key] for key in given_facts} == given_facts
    assert again.reference is None
    assert again.provenance["checkpoint"] == "mine.safetensors"


@pytest.mark.parametrize("layers", [(768, 1), (768, 8, 1)])
def test_a_head_file_reads_back_as_it_was(layers: tuple[int, ...], tmp_path: Path) -> None:
    head = Head("mine", CLIP_VIT_L_14, tuple(some_layers(*layers)), {"scale": "über alles ≤ 10"})
    save_head(head, tmp_path / "mine.safetensors")
    again = load_head(str(tmp_path / "mine.safetensors"))
    assert again.sha256 == head.sha256
    assert again.provenance == head.provenance
    for pair, other in zip(head.layers, again.layers, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(pair, other, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_flipped_byte_of_the_weights_is_refused(tmp_path: Path) -> None:
    good = bundled_heads()[REFERENCE_HEAD].read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for place in (start, (start + len(good)) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        path = tmp_path / "bad.safetensors"
        path.write_bytes(bad)
        with pytest.raises(ChecksumError, match="not those that were saved") as caught:
            load_head(path)
        assert str(path) in str(caught.value)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100, 2000, -1])
def test_a_head_file_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(bundled_heads()[REFERENCE_HEAD].read_bytes()[:cut])
    with pytest.raises(HeadError, match="not a safetensors file"):
        load_head(path)


@pytest.mark.parametrize("lacking", ["name", "space", "weights_sha256"])
def test_a_head_file_without_its_facts_is_refused(lacking: str, tmp_path: Path) -> None:
    data = bundled_heads()[REFERENCE_HEAD].read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"][lacking]
    text = json.dumps(header).encode()
    path = tmp_path / "bare.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(HeadError, match=r"bare\.safetensors: "):
        load_head(path)


def test_a_safetensors_file_of_another_kind_is_no_head_file(tmp_path: Path) -> None:
    path = save_checkpoint(state_dict(some_layers(768, 1), [0]), tmp_path / "other.safetensors")
    assert read_head(path) is None


# Verification.


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_folding_error_can_be_recomputed(name: str, shared: Path) -> None:
    checkpoint = read_checkpoint(shared / "heads" / f"{PUBLISHED[name]}.pth")
    assert checkpoint.activation == "none"
    assert checkpoint.published["name"] == name
    head = load_head(name)
    error = folding_error(head, checkpoint, rows=2000, seed=5)
    # float32 layers of scores up to 30 (sac-public's inputs are 28 times as long).
    assert 0 < error < 2e-5
    weight, bias = head.layers[0]
    off = Head("off", head.space, ((weight, bias + np.float32(0.125)),))
    assert folding_error(off, checkpoint, rows=2000, seed=5) == pytest.approx(0.125, abs=1e-4)


def test_verify_on_the_command_line(
    cli: Callable[..., subprocess.CompletedProcess[str]], shared: Path
) -> None:
    ran = cli("heads", "verify", shared / "heads" / f"{REFERENCE_HEAD}.pth", "--rows", 2000)
    assert ran.returncode == 0, ran.stderr
    assert REFERENCE_HEAD in ran.stdout
    assert ran.stdout.strip().endswith("ok")
    wrong = cli(
        *("heads", "verify", shared / "heads" / f"{REFERENCE_HEAD}.pth", "--rows", 2000),
        *("--head", "ava+logos-l14-linearMSE"),
    )
    assert wrong.returncode == 1
    assert "TOO LARGE" in wrong.stdout


# Tensors.


def with_odd_rows(vectors: NDArray[Any]) -> NDArray[Any]:
    vectors = vectors.copy()
    vectors[1], vectors[5, 3], vectors[7, 8] = 0, np.nan, np.inf
    return vectors


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_tensor_in_main_memory_gives_the_bits_of_the_array(
    dtype: torch.dtype, relu: bool, make_embeddings: Make
) -> None:
    head = Head("relu", CLIP_VIT_L_14, tuple(some_layers(768, 8, 1))) if relu else load_head()
    tensor = torch.from_numpy(with_odd_rows(make_embeddings(50, dtype=np.float64))).to(dtype)
    expected = head(tensor.numpy())
    found = head(tensor)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    assert found.device == tensor.device
    assert np.array_equal(found.numpy().view(np.uint32), expected.view(np.uint32))
    one = head(tensor[2])
    assert one.shape == ()
    assert one == found[2]
    for same in (tensor.T.contiguous().T, tensor.repeat_interleave(2, 0)[::2]):
        assert np.array_equal(head(same).numpy().view(np.uint32), expected.view(np.uint32))
    assert head(tensor[:0]).shape == (0,)


def test_a_bfloat16_tensor_is_widened_exactly(make_embeddings: Make) -> None:
    tensor = torch.from_numpy(make_embeddings(30, dtype=np.float32)).bfloat16()
    wide = (tensor.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    assert np.array_equal(load_head()(tensor).numpy(), load_head()(wide))


def test_a_tensor_that_requires_a_gradient_is_scored(make_embeddings: Make) -> None:
    vectors = make_embeddings(10, dtype=np.float32)
    tensor = torch.from_numpy(vectors).requires_grad_()
    found = load_head()(tensor)
    assert not found.requires_grad
    assert tensor.requires_grad
    assert np.array_equal(found.numpy(), load_head()(vectors))


TENSOR_KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TENSOR_KINDS)
def test_the_tensor_operations_agree_with_float64(
    dtype: torch.dtype, relu: bool, make_embeddings: Make
) -> None:
    layers = some_layers(768, 8, 1) if relu else [load_head().layers[0]]
    head = Head("mine", CLIP_VIT_L_14, tuple(layers))
    tensor = torch.from_numpy(make_embeddings(300, dtype=np.float64, scale=17.0)).to(dtype)
    found = score_on_device(head, tensor)
    assert found.dtype == torch.float32
    expected = by_hand(layers, tensor.double().numpy(), relu=relu)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("relu", [False, True])
@settings(max_examples=8, deadline=None)
@given(
    dtype=st.sampled_from(TENSOR_KINDS),
    cut=st.integers(0, 100),
    seed=st.integers(0, 99),
)
def test_the_tensor_operations_score_each_row_alone(
    make_embeddings: Make, relu: bool, dtype: torch.dtype, cut: int, seed: int
) -> None:
    head = Head("relu", CLIP_VIT_L_14, tuple(some_layers(768, 8, 1))) if relu else load_head()
    vectors = with_odd_rows(make_embeddings(100, seed=seed, dtype=np.float64))
    tensor = torch.from_numpy(vectors).to(dtype)
    together = score_on_device(head, tensor)
    assert torch.isnan(together).nonzero().flatten().tolist() == [1, 5, 7]
    parts = torch.cat([score_on_device(head, tensor[:cut]), score_on_device(head, tensor[cut:])])
    backwards = score_on_device(head, tensor.flip(0)).flip(0)
    for again in (parts, backwards):
        assert torch.equal(again.view(torch.int32), together.view(torch.int32))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e200)]
)
def test_the_tensor_operations_on_huge_and_tiny_rows(
    dtype: torch.dtype, size: float, make_embeddings: Make
) -> None:
    vectors = make_embeddings(5, dtype=np.float64)
    found = score_on_device(load_head(), torch.from_numpy(vectors).mul(size).to(dtype))
    expected = by_hand([load_head().layers[0]], vectors)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5)


def test_the_tensor_operations_refuse_another_width() -> None:
    with pytest.raises(WidthError, match="have 512 values each"):
        score_on_device(load_head(), torch.ones(2, 512))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_on_an_accelerator_is_scored_there(make_embeddings: Make) -> None:
    vectors = make_embeddings(1000)
    tensor = torch.from_numpy(vectors).cuda()
    found = load_head()(tensor)
    assert found.device == tensor.device
    expected = by_hand([load_head().layers[0]], vectors)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=2e-5)
    parts = torch.cat([load_head()(tensor[:333]), load_head()(tensor[333:])])
    assert torch.equal(parts.view(torch.int32), found.view(torch.int32))


def test_every_refusal_is_one_of_ours() -> None:
    for kind in (ChecksumError, HeadError, MissingExtraError, WidthError):
        assert issubclass(kind, AestheticFilterError)


@pytest.mark.parametrize("name", bundled_heads())
def test_rounding_embeddings_to_float16_moves_scores_by_no_more_than_the_docs_say(
    name: str, make_embeddings: Callable[..., NDArray[Any]]
) -> None:
    vectors = make_embeddings(5_000, seed=9, dtype=np.float32)
    head = load_head(name)
    moved = np.abs(head(vectors) - head(vectors.astype(np.float16))).max()
    assert moved < (0.02 if name == "sac-public" else 0.001)
