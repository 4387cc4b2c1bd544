"""Images in memory: ``ImageScorer``, and the score as a differentiable reward."""

from __future__ import annotations

import io
import itertools
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aesthetic_filter as af
from aesthetic_filter.clip import preprocess
from aesthetic_filter.clip.encoder import Encoder, StoppedError
from aesthetic_filter.clip.tower import Tower
from aesthetic_filter.heads.head import CLIP_VIT_L_14
from images import (
    EXACT,
    WITHIN,
    Oracle,
    affine,
    encoded,
    jpeg,
    picture,
    pictures,
    rows,
    write_files,
)


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> Oracle:
    return Oracle(model_dir)


@pytest.fixture(autouse=True)
def weights(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", str(model_dir))


@pytest.fixture(scope="module")
def relu() -> af.Head:
    """A head of two layers with a ReLU between them, which some of its units are below."""
    chance = np.random.default_rng(0)
    first = chance.standard_normal((16, 768)).astype(np.float32)
    second = chance.standard_normal((1, 16)).astype(np.float32)
    bias = chance.standard_normal(16).astype(np.float32)
    return af.Head("relu", CLIP_VIT_L_14, ((first, bias), (second, np.array([5], np.float32))))


def through(relu: af.Head, vectors: np.ndarray) -> np.ndarray:
    (first, bias), (second, last) = relu.layers
    hidden = vectors.astype(np.float64) @ first.T.astype(np.float64) + bias
    assert (hidden < 0).any()
    assert (hidden > 0).any()
    return (np.maximum(hidden, 0) @ second.T.astype(np.float64) + last)[:, 0]


# ImageScorer.


def test_every_kind_of_image_scores_as_in_a_run(tmp_path: Path, oracle: Oracle) -> None:
    files = pictures()
    write_files(tmp_path / "in", files)
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    run = {row["image_id"]: row["aesthetic_score"] for row in rows(tmp_path / "s")}
    expected = dict(zip(files, oracle.score(list(files.values())), strict=True))

    names = list(files)
    mixed: list[Any] = []
    for number, name in enumerate(names):
        path = tmp_path / "in" / name
        mixed.append((str(path), path, files[name], bytearray(files[name]))[number % 4])
    wide, grey = "a/wide.jpg", "b/grey.png"
    opened = Image.open(io.BytesIO(files[wide]))
    mixed += [opened, np.asarray(opened), np.asarray(Image.open(io.BytesIO(files[grey])))]
    names += [wide, wide, grey]

    with af.ImageScorer(options=EXACT) as scorer:
        scores = scorer(mixed)
        assert scores.dtype == np.float32
        assert scores.shape == (len(names),)
        for score, name in zip(scores, names, strict=True):
            assert score == pytest.approx(run[name], abs=1e-4)
            assert score == pytest.approx(expected[name], abs=WITHIN)
        vectors = scorer.embed(mixed)
        assert vectors.dtype == np.float16
        assert vectors.shape == (len(names), 768)
        assert np.abs(affine(vectors) - scores).max() < 1e-4


def test_one_image_or_none(tmp_path: Path, oracle: Oracle) -> None:
    content = jpeg(1, 224)
    (tmp_path / "a.jpg").write_bytes(content)
    (expected,) = oracle.score([content])
    opened = Image.open(io.BytesIO(content))
    array = np.asarray(opened)
    scorer = af.ImageScorer(options=EXACT)
    for one in (str(tmp_path / "a.jpg"), tmp_path / "a.jpg", content, opened, array):
        scores = scorer(one)
        assert scores.shape == (1,)
        assert scores[0] == pytest.approx(expected, abs=WITHIN)
    for several in ([array, array], (array, array), np.stack([array, array])):
        assert scorer(several) == pytest.approx([expected] * 2, abs=WITHIN)
    grey = np.asarray(opened.convert("L"))
    assert scorer(grey) == pytest.approx(scorer([grey[:, :, None]]), abs=1e-4)
    assert scorer([]).shape == (0,)
    assert scorer([]).dtype == np.float32
    assert scorer.embed([]).shape == (0, 768)
    assert scorer.best([]) == []
    scorer.close()


def test_a_broken_image_is_nan_with_a_warning(tmp_path: Path, oracle: Oracle) -> None:
    good = jpeg(1)
    with af.ImageScorer(options=EXACT) as scorer:
        broken = [good, b"broken", tmp_path / "gone.jpg", b"", good, b"<html>", good]
        with pytest.warns(UserWarning, match="not scored") as told:
            scores = scorer(broken)
        assert np.flatnonzero(np.isnan(scores)).tolist() == [1, 2, 3, 5]
        assert scores[[0, 4, 6]] == pytest.approx(oracle.score([good] * 3), abs=WITHIN)
        assert len(told) == 1
        text = str(told[0].message)
        for word in (
            "not scored",
            "image 1: not an image that can be decoded",
            "image 2: no such file",
            "gone.jpg",
            "image 3: image is empty",
            "1 more",
        ):
            assert word in text
        assert told[0].filename == __file__
        with pytest.raises(TypeError, match="not <class 'int'>"):
            scorer([good, 5])
        assert scorer([good]) == pytest.approx(scores[:1], abs=1e-4)


def test_the_best_come_first(oracle: Oracle) -> None:
    images = [jpeg(n) for n in range(6)]
    truth = dict(zip(images, oracle.score(images), strict=True))
    assert np.diff(sorted(truth.values())).min() > 2 * WITHIN
    candidates = [*images[:3], b"broken", *images[3:]]
    ranked = sorted((0, 1, 2, 4, 5, 6), key=lambda number: -truth[candidates[number]])
    with af.ImageScorer(options=EXACT) as scorer:
        for k in (1, 4, 99):
            with pytest.warns(UserWarning, match="image 3"):
                best = scorer.best(candidates, k)
            assert [one.index for one in best] == ranked[:k]
            for one in best:
                assert one.image is candidates[one.index]
                assert one.score == pytest.approx(truth[one.image], abs=WITHIN)
        assert [one.image for one in scorer.best(images)] == [max(images, key=truth.__getitem__)]


def test_equal_ones_come_in_the_order_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.array([5, 6, 5, np.nan, 6, 5], np.float32)
    monkeypatch.setattr(af.ImageScorer, "__call__", lambda *_: scores)
    assert [one.index for one in af.ImageScorer().best([b""] * 6, 9)] == [1, 4, 0, 2, 5]


def test_many_more_images_than_a_batch(oracle: Oracle) -> None:
    images = [jpeg(n % 7) for n in range(100)]
    expected = np.tile(oracle.score(images[:7]), 15)[:100]
    with af.ImageScorer(options=EXACT) as scorer:
        assert np.abs(scorer(images) - expected).max() < WITHIN


def test_decoding_does_not_run_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    lead: list[int] = []
    embedded = 0
    real = preprocess.preprocess

    def counted(*given: Any) -> Any:
        decoded.append(1)
        return real(*given)

    def slow(_: Tower, images: torch.Tensor, **__: Any) -> torch.Tensor:
        nonlocal embedded
        time.sleep(0.01)
        lead.append(len(decoded) - embedded)
        embedded += len(images)
        return torch.ones(len(images), 768) / 768**0.5

    monkeypatch.setattr(preprocess, "preprocess", counted)
    monkeypatch.setattr(Tower, "__call__", slow)
    with af.ImageScorer(options=EXACT) as scorer:
        assert scorer([np.zeros((224, 224, 3), np.uint8)] * 1000).shape == (1000,)
    assert max(lead) < 300


def test_it_can_be_sent_to_another_process_and_closed(relu: af.Head, oracle: Oracle) -> None:
    content = jpeg(3)
    (expected,) = through(relu, oracle.embed([content]))
    scorer = af.ImageScorer(relu, options=EXACT)
    assert scorer(content) == pytest.approx([expected], abs=20 * WITHIN)
    twin = pickle.loads(pickle.dumps(scorer))
    assert twin.head.sha256 == relu.sha256
    assert twin(content) == pytest.approx(scorer(content), abs=1e-3)
    twin.close()
    scorer.close()
    scorer.close()
    assert scorer(content) == pytest.approx([expected], abs=20 * WITHIN)  # it begins anew
    scorer.close()


def test_nothing_is_loaded_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with af.ImageScorer("laion-v1") as scorer:
        assert scorer.head.name == "laion-v1"


def test_orientation_follows_the_options(oracle: Oracle) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(9, 300, 200), "JPEG", exif=exif)
    for upright in (True, False):
        options = af.ImageOptions(device="cpu", precision="float32", exif=upright)
        with af.ImageScorer(options=options) as scorer:
            (expected,) = oracle.score([content], exif=upright)
            assert scorer(content) == pytest.approx([expected], abs=WITHIN)


def test_what_is_under_way_is_given_up_when_it_is_closed() -> None:
    encoder = Encoder(EXACT)
    futures = [encoder.submit(jpeg(n % 5, 400)) for n in range(60)]
    encoder.close()
    for future in futures:
        error = future.exception(timeout=10)
        assert error is None or isinstance(error, StoppedError)


# AestheticReward.


def squares(count: int, side: int = 224) -> np.ndarray:
    return np.stack([np.asarray(picture(50 + n, side, side)) for n in range(count)])


def tensors(arrays: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(arrays.copy()).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def reward(model_dir: Path) -> af.AestheticReward:
    return af.AestheticReward(model_dir=model_dir)


def test_the_reward_is_the_score(reward: af.AestheticReward, relu: af.Head, oracle: Oracle) -> None:
    arrays = squares(3)
    vectors = oracle.embed([encoded(Image.fromarray(a), "PNG") for a in arrays])
    found = reward(tensors(arrays))
    assert found.dtype == torch.float32
    assert found.shape == (3,)
    assert found.detach().numpy() == pytest.approx(affine(vectors), abs=1e-4)
    with af.ImageScorer(options=EXACT) as scorer:
        assert found.detach().numpy() == pytest.approx(scorer(arrays), abs=WITHIN)
    # Half precision in, float32 out.
    half = reward(tensors(arrays).half())
    assert half.dtype == torch.float32
    assert half.detach().numpy() == pytest.approx(affine(vectors), abs=1e-2)

    found = af.AestheticReward(relu)(tensors(arrays)).detach().numpy()
    assert found == pytest.approx(through(relu, vectors), abs=1e-3)
    with af.ImageScorer(relu, options=EXACT) as scorer:
        assert found == pytest.approx(scorer(arrays), abs=20 * WITHIN)


@pytest.mark.parametrize("layers", ["affine", "relu"])
@pytest.mark.parametrize("side", [224, 256])
def test_the_gradient_is_that_of_finite_differences(
    layers: str, side: int, reward: af.AestheticReward, relu: af.Head
) -> None:
    module = reward if layers == "affine" else af.AestheticReward(relu)
    # Away from black and white, where what is resized is clamped.
    images = (tensors(squares(2, side)) * 0.6 + 0.2).requires_grad_()
    module(images).sum().backward()
    gradient = images.grad
    assert gradient is not None
    assert gradient.shape == images.shape
    assert gradient.abs().sum() > 0
    # A direction at random says nothing among 150,000: each is the gradient's own, in part.
    chance = torch.Generator().manual_seed(0)
    noise = (torch.rand(images.shape, generator=chance) < 0.3).float()
    channel, corner = torch.zeros_like(images), torch.zeros_like(images)
    channel[:, 1] = 1
    corner[0, :, 40:110, 50:150] = 1
    for part in (torch.ones_like(images), noise, channel, corner):
        direction = gradient * part.detach()
        direction /= direction.norm()
        step = 0.05
        with torch.no_grad():
            up, down = (module(images + way * step * direction) for way in (1, -1))
        slope = float((up.double() - down.double()).sum()) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_climbing_the_gradient_raises_the_score(reward: af.AestheticReward) -> None:
    images = tensors(squares(1))
    scores = []
    for _ in range(5):
        images.requires_grad_()
        score = reward(images)
        scores.append(float(score.detach()))
        (gradient,) = torch.autograd.grad(score.sum(), images)
        images = (images + 0.5 * gradient / gradient.norm()).clamp(0, 1).detach()
    assert all(b > a for a, b in itertools.pairwise(scores))


def test_its_own_weights_are_frozen(reward: af.AestheticReward) -> None:
    assert not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    images = tensors(squares(1)).requires_grad_()
    reward(images).backward()
    for buffer in reward.buffers():
        assert not buffer.requires_grad
        assert buffer.grad is None
    assert not reward(tensors(squares(1))).requires_grad


def test_other_sizes_are_resized(reward: af.AestheticReward) -> None:
    arrays = {
        (width, height): np.asarray(picture(70, width, height))
        for width, height in ((448, 448), (400, 300), (250, 333), (100, 120))
    }
    with af.ImageScorer(options=EXACT) as scorer:
        for array in arrays.values():
            found = reward(tensors(array[None])).detach().numpy()
            assert found == pytest.approx(scorer(array), abs=0.02)


@pytest.mark.parametrize(
    ("images", "error", "word"),
    [
        (torch.zeros(3, 224, 224), ValueError, r"\(N, 3, H, W\)"),
        (torch.zeros(2, 224, 224, 3), ValueError, r"\(2, 224, 224, 3\)"),
        (torch.zeros(2, 1, 224, 224), ValueError, r"\(N, 3, H, W\)"),
        (torch.zeros(2, 3, 224, 224, dtype=torch.uint8), TypeError, "uint8"),
    ],
)
def test_what_is_no_batch_of_images(
    images: torch.Tensor, error: type[Exception], word: str, reward: af.AestheticReward
) -> None:
    with pytest.raises(error, match=word):
        reward(images)


def test_it_is_a_module_like_any_other(model_dir: Path, reward: af.AestheticReward) -> None:
    images = tensors(squares(2))
    expected = reward(images).numpy()
    other = af.AestheticReward("laion-v1", model_dir=model_dir)
    assert other(images).numpy() != pytest.approx(expected, abs=0.01)
    other.load_state_dict(reward.state_dict())
    assert other(images).numpy() == pytest.approx(expected, abs=1e-6)
    assert reward.to("cpu") is reward
    assert reward(images).numpy() == pytest.approx(expected, abs=1e-6)
    whole = torch.nn.Sequential(torch.nn.Identity(), other).eval().requires_grad_(False)
    assert whole(images).numpy() == pytest.approx(expected, abs=1e-6)
    assert other.half()(images).numpy() == pytest.approx(expected, abs=0.05)


def test_no_images_no_scores(reward: af.AestheticReward) -> None:
    assert reward(torch.zeros(0, 3, 224, 224)).shape == (0,)


def test_weights_of_ones_own_and_another_precision(
    tmp_path: Path, model_dir: Path, reward: af.AestheticReward
) -> None:
    (path,) = model_dir.rglob("model.safetensors")
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(path.read_bytes())
    images = tensors(squares(2))
    expected = reward(images).numpy()
    mine = af.AestheticReward(weights=copy, precision="bfloat16")
    assert mine(images).numpy() == pytest.approx(expected, abs=0.05)
    assert not np.array_equal(mine(images).numpy(), expected)
