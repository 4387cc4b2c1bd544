"""The vision tower: the same embeddings as transformers, and files that are not right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional

from aesthetic_filter.clip import tower as module
from aesthetic_filter.clip.tower import (
    MEAN,
    STD,
    Stopped,
    Tower,
    choose_precision,
    load_tower,
    normalise,
    resolve_device,
)
from aesthetic_filter.errors import UsageError, WeightsError
from clip_weights import FULL, clip_tensors, write_clip

Tensors = dict[str, NDArray[Any]]

CHANGE = {"float32": 1e-6, "bfloat16": 1e-3}
"""By how much an embedding's values may depend on how many images stand beside it.

With AVX-512 it is nothing, bit for bit; elsewhere a library may add in another order for another
number of rows.
"""


def some_pixels(count: int, seed: int = 0) -> Tensor:
    """(count, 224, 224, 3) uint8: blurred noise, each image of another brightness and contrast."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.standard_normal((count, 3, 9, 9), dtype=np.float32))
    centre = torch.from_numpy(random.uniform(60, 200, (count, 3, 1, 1)).astype(np.float32))
    smooth = functional.interpolate(coarse, (224, 224), mode="bilinear")
    return (60 * smooth + centre).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def in_transformers(path: Path, pixels: Tensor, **size: int) -> Tensor:
    """(N, 768) float32 of unit norm, by transformers' tower with this file's weights."""
    from safetensors.torch import load_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=size.get("width", 64),
        intermediate_size=size.get("mlp", 256),
        projection_dim=768,
        num_hidden_layers=size.get("layers", 2),
        num_attention_heads=size.get("width", 64) // 64,
        image_size=224,
        patch_size=14,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    state = {name: v for name, v in load_file(path).items() if name.startswith("vis")}
    assert not model.load_state_dict(state, strict=False).missing_keys
    x = pixels.permute(0, 3, 1, 2).double() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        return functional.normalize(model(x.float()).image_embeds)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def by_hand(
    tensors: Tensors, x: Tensor, activation: Callable[[Tensor], Tensor] = quick_gelu
) -> Tensor:
    """The network on normalised (N, 3, 224, 224), every row of every block, in float64."""
    state = {name: torch.from_numpy(array).double() for name, array in tensors.items()}
    vision = "vision_model."

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{vision}{name}.weight"].T + state[f"{vision}{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{vision}{name}.weight"] + state[f"{vision}{name}.bias"]

    x = functional.conv2d(
        x.double(), state[f"{vision}embeddings.patch_embedding.weight"], stride=14
    )
    x = x.flatten(2).transpose(1, 2)
    token = state[f"{vision}embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([token, x], 1) + state[f"{vision}embeddings.position_embedding.weight"]
    x = norm("pre_layrnorm", x)
    for n in range(sum(name.endswith("mlp.fc1.weight") and "vision" in name for name in state)):
        block = f"encoder.layers.{n}"
        y = norm(f"{block}.layer_norm1", x)
        q, k, v = (linear(f"{block}.self_attn.{part}_proj", y) for part in "qkv")
        heads = []
        for at in range(0, x.shape[-1], 64):
            scores = q[..., at : at + 64] @ k[..., at : at + 64].transpose(1, 2) / 8
            heads.append(scores.softmax(-1) @ v[..., at : at + 64])
        x = x + linear(f"{block}.self_attn.out_proj", torch.cat(heads, -1))
        y = activation(linear(f"{block}.mlp.fc1", norm(f"{block}.layer_norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", y)
    y = norm("post_layernorm", x)[:, 0] @ state["visual_projection.weight"].T
    return y / y.norm(dim=1, keepdim=True)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest cosine distance between rows."""
    return float((1 - functional.cosine_similarity(a.double(), b.double())).max())


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "small.safetensors", width=128)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """At full size: embeddings of three images, by name of who computed them."""
    path = write_clip(tmp_path_factory.mktemp("clip") / "full.safetensors", **FULL, text=False)
    pixels = some_pixels(3)
    found = {"transformers": in_transformers(path, pixels, **FULL)}
    for precision in ("float32", "bfloat16"):
        tower = load_tower(path, precision=precision)
        found[precision] = tower(pixels)
        found[f"{precision} alone"] = tower(pixels[2:])
    path.unlink()  # 1.2 GB, and pytest keeps the folders of the last runs
    return found


# The embeddings.


def test_at_full_size_it_agrees_with_transformers(full: dict[str, Tensor]) -> None:
    expected = full["transformers"]
    assert full["float32"].shape == (3, 768)
    assert full["float32"].dtype == full["bfloat16"].dtype == torch.float32
    assert distance(full["float32"], expected) <= 1e-5
    assert largest(full["float32"], expected) <= 1e-4
    assert distance(full["bfloat16"], expected) <= 1e-4
    # The images differ visibly: else agreement would mean nothing.
    assert distance(expected[:1], expected[1:2]) > 0.01
    assert distance(expected[1:2], expected[2:]) > 0.01


@pytest.mark.parametrize(
    ("precision", "cosine", "absolute"),
    [("float32", 1e-6, 1e-5), ("bfloat16", 1e-4, 3e-3), ("float16", 1e-5, 1e-3)],
)
def test_a_small_one_agrees_with_transformers(
    small: Path, precision: str, cosine: float, absolute: float
) -> None:
    pixels = some_pixels(4)
    expected = in_transformers(small, pixels, width=128, mlp=512)
    tower = load_tower(small, precision=precision)
    assert (tower.device, tower.precision) == (torch.device("cpu"), precision)
    assert repr(tower) == f"Tower(2 blocks, width 128, {precision}, cpu)"
    embeddings = tower(pixels)
    assert distance(embeddings, expected) <= cosine
    assert largest(embeddings, expected) <= absolute
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("layers", [1, 3])
def test_it_is_every_row_of_every_block_and_quick_gelu(layers: int, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.safetensors", layers=layers, seed=3)
    x = normalise(some_pixels(2))
    tensors = clip_tensors(layers=layers, seed=3)
    embeddings = load_tower(path)(x)
    assert largest(embeddings, by_hand(tensors, x)) <= 1e-6
    assert largest(embeddings, by_hand(tensors, x, functional.gelu)) > 1e-4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_layouts_are_the_same_model(small: Path, precision: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "open_clip.safetensors", width=128, layout="open_clip")
    pixels = some_pixels(2)
    theirs = load_tower(path, precision=precision)(pixels)
    assert torch.equal(theirs, load_tower(small, precision=precision)(pixels))


def test_pixels_are_normalised_as_torchvision_does(shared: Path) -> None:
    file = np.load(shared / "preprocess" / "expected_pixel_values.npz")
    expected = torch.from_numpy(file["pixel_values"])
    mean, std = (torch.tensor(v).double()[:, None, None] for v in (MEAN, STD))
    levels = (expected.double() * std + mean) * 255
    pixels = levels.round()
    assert (levels - pixels).abs().max() < 1e-3
    found = normalise(pixels.to(torch.uint8).permute(0, 2, 3, 1))
    assert found.dtype == torch.float32
    assert largest(found, expected) < 1e-6


def test_pixels_and_normalised_pixels_give_the_same(small: Path) -> None:
    tower, pixels = load_tower(small), some_pixels(2)
    assert torch.equal(tower(pixels), tower(normalise(pixels)))
    assert tower(pixels[:0]).shape == (0, 768)
    assert load_tower(small, precision="bfloat16")(pixels[:0]).shape == (0, 768)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_embedding_is_the_image_s_alone(
    small: Path, precision: str, full: dict[str, Tensor]
) -> None:
    tower, pixels = load_tower(small, precision=precision), some_pixels(9)
    together = tower(pixels)
    exact = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    bound = 0.0 if exact else CHANGE[precision]
    for size in range(1, 9):
        assert largest(tower(pixels[:size]), together[:size]) <= bound
        assert largest(tower(pixels[-size:]), together[-size:]) <= bound
    assert largest(full[f"{precision} alone"], full[precision][2:]) <= bound


@pytest.mark.parametrize(("precision", "close"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_gradients_reach_the_pixels(precision: str, close: float, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.safetensors")
    direction = torch.from_numpy(np.random.default_rng(5).standard_normal(768, dtype=np.float32))
    gradients = []
    for embed in (load_tower(path, precision=precision), lambda x: by_hand(clip_tensors(), x)):
        x = normalise(some_pixels(2)).requires_grad_()
        (embed(x) @ direction.to(embed(x).dtype)).sum().backward()
        gradients.append(x.grad.double())
    found, expected = gradients
    assert expected.norm() > 0
    assert (found - expected).norm() <= close * expected.norm()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 224, 224, dtype=torch.uint8),
        torch.zeros(224, 224, 3, dtype=torch.uint8),
        torch.zeros(1, 336, 336, 3, dtype=torch.uint8),
        torch.zeros(1, 224, 224, 3, dtype=torch.int64),
        torch.zeros(1, 224, 224, 3),
    ],
)
def test_other_images_are_refused(small: Path, images: Tensor) -> None:
    with pytest.raises(ValueError, match="224"):
        load_tower(small)(images)


def test_it_stops_between_blocks(tmp_path: Path) -> None:
    tower = load_tower(write_clip(tmp_path / "clip.safetensors", layers=4))
    asked: list[bool] = []

    def third_time() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Stopped):
        tower(some_pixels(1), should_stop=third_time)
    assert len(asked) == 3
    pixels = some_pixels(1)
    assert torch.equal(tower(pixels, should_stop=lambda: False), tower(pixels))


# Files.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_may_be_of_sixteen_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    rounded = {
        name: torch.from_numpy(np.array(array)).to(dtype) if array.dtype == np.float32 else None
        for name, array in clip_tensors().items()
    }
    kept = {name: tensor for name, tensor in rounded.items() if tensor is not None}
    save_torch(kept, tmp_path / "clip.safetensors")
    x = normalise(some_pixels(2))
    expected = by_hand({name: tensor.float().numpy() for name, tensor in kept.items()}, x)
    assert largest(load_tower(tmp_path / "clip.safetensors")(x), expected) <= 1e-6


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
def test_only_the_vision_tower_is_read(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "clip.safetensors", layout=layout)
    read: list[str] = []
    opened = safetensors.safe_open

    class Recorder:
        def __init__(self, *given: Any, **named: Any) -> None:
            self.file = opened(*given, **named)

        def __enter__(self) -> Recorder:
            self.file.__enter__()
            return self

        def __exit__(self, *given: Any) -> None:
            self.file.__exit__(*given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Recorder)
    load_tower(path)
    vision = {
        name for name in clip_tensors(layout=layout, text=False) if "position_ids" not in name
    }
    assert sorted(read) == sorted(vision)


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
def test_the_file_is_not_needed_afterwards(layout: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.safetensors", layout=layout)
    tower, pixels = load_tower(path), some_pixels(1)
    before = tower(pixels)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(tower(pixels), before)


def changed(path: Path, change: Callable[[Tensors], object], **size: Any) -> Path:
    tensors = clip_tensors(**size)
    change(tensors)
    save_file(tensors, path)
    return path


def narrower(name: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name] = np.ascontiguousarray(tensors[name][..., :-1])

    return change


NAMES = {
    layout: [name for name in clip_tensors(layout=layout, text=False) if "_ids" not in name]
    for layout in ("hf", "open_clip")
}


@pytest.mark.parametrize(("layout", "name"), [(key, n) for key in NAMES for n in NAMES[key]])
def test_a_missing_or_misshapen_tensor_is_named(layout: str, name: str, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.safetensors", lambda t: t.pop(name), layout=layout)
    with pytest.raises(WeightsError) as caught:
        load_tower(path)
    assert name in str(caught.value)
    assert str(path) in str(caught.value)
    path = changed(tmp_path / "s.safetensors", narrower(name), layout=layout)
    with pytest.raises(WeightsError) as caught:
        load_tower(path)
    if name != "visual.proj":  # its last axis is the embedding's
        assert any(part in str(caught.value) for part in (name, "its width is 63"))


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("hf", "vision_model.encoder.layers.0.self_attn.gamma"),
        ("hf", "visual.attn_pool.query"),
        ("open_clip", "visual.attn_pool.query"),
        ("hf", "something.else"),
        ("open_clip", "something.else"),
        ("hf", "my_text_model.weight"),
    ],
)
def test_an_unknown_tensor_is_named(layout: str, name: str, tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[name] = np.zeros(3, np.float32)

    path = changed(tmp_path / "clip.safetensors", add, layout=layout)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        load_tower(path)


def test_a_whole_block_is_missing(tmp_path: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if "vision_model.encoder.layers.1." in name]:
            del tensors[name]

    path = changed(tmp_path / "clip.safetensors", drop, layers=3)
    with pytest.raises(WeightsError, match=r"layers\.1\..* and 13 more"):
        load_tower(path)


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"image_size": 336}, "is for 336-pixel images"),
        ({"patch": 16}, "patches are 16 pixels"),
        ({"patch": 32}, "patches are 32 pixels"),
        ({"projection": 512}, "gives 512-d embeddings; the aesthetic heads take 768"),
        ({"projection": 1024, "width": 128}, "gives 1024-d embeddings"),
        ({"width": 80}, "its width is 80"),
    ],
)
def test_another_model_is_called_by_what_it_is(
    size: dict[str, Any], words: str, layout: str, tmp_path: Path
) -> None:
    path = write_clip(tmp_path / "clip.safetensors", layout=layout, **size)
    with pytest.raises(WeightsError, match=words):
        load_tower(path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"

    def quantise(tensors: Tensors) -> None:
        tensors[name] = tensors[name].astype(np.int8)

    with pytest.raises(WeightsError, match=r"fc1\.weight is of type I8"):
        load_tower(changed(tmp_path / "clip.safetensors", quantise))


def test_a_file_of_something_else(tmp_path: Path) -> None:
    save_file({"layers.0.weight": np.zeros((1, 768), np.float32)}, tmp_path / "head.safetensors")
    with pytest.raises(WeightsError, match=r"no vision tower of CLIP: it holds layers\.0\.weight"):
        load_tower(tmp_path / "head.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(WeightsError, match="it holds no tensors"):
        load_tower(tmp_path / "empty.safetensors")


def test_no_safetensors_file(small: Path, tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(64, 768)}, tmp_path / "clip.pt")
    (tmp_path / "short.safetensors").write_bytes(small.read_bytes()[:-100])
    (tmp_path / "none.safetensors").write_bytes(b"")
    for name in ("clip.pt", "short.safetensors", "none.safetensors", "absent.safetensors", "."):
        with pytest.raises(WeightsError, match=r"openai/clip-vit-large-patch14") as caught:
            load_tower(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


# Where, and in what precision.


def test_an_unknown_precision(small: Path) -> None:
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        load_tower(small, precision="int8")


def test_the_precision_that_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("cpu") in ("float32", "bfloat16")
    assert choose_precision(torch.device("cuda", 1)) == "float16"
    assert choose_precision("mps") == "float32"

    def slow(which: torch.dtype) -> Callable[[Tensor, Tensor], None]:
        def linear(x: Tensor, _: Tensor) -> None:
            clock[0] += 3.0 if x.dtype == which else 2.1

        return linear

    clock = [0.0]
    monkeypatch.setattr(module.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(module.functional, "linear", slow(torch.bfloat16))
    assert choose_precision("cpu") == "float32"
    monkeypatch.setattr(module.functional, "linear", slow(torch.float32))
    assert choose_precision("cpu") == "float32"  # faster, but not by half
    monkeypatch.setattr(
        module.functional, "linear", lambda x, _: clock.__setitem__(0, clock[0] + x.element_size())
    )
    assert choose_precision("cpu") == "bfloat16"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def there(cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    def named(name: str) -> list[str]:
        return [str(device) for device in resolve_device(name)]

    there(cuda=2, mps=False)
    assert named("auto") == named("cuda") == ["cuda:0", "cuda:1"]
    assert named("cuda:1") == ["cuda:1"]
    assert named("cpu") == ["cpu"]
    with pytest.raises(UsageError, match="cuda:0, cuda:1, cpu"):
        resolve_device("cuda:2")
    there(cuda=0, mps=True)
    assert named("auto") == named("mps") == ["mps"]
    there(cuda=0, mps=False)
    assert named("auto") == ["cpu"]
    for name in ("cuda", "cuda:0", "mps", "gpu", ""):
        with pytest.raises(UsageError, match="there is: cpu;"):
            resolve_device(name)


def test_without_torch_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from aesthetic_filter.errors import MissingExtraError\n"
        "try:\n    import aesthetic_filter.clip.tower\n"
        "except MissingExtraError as error:\n    print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 'pip install "aesthetic-filter[clip]"' in ran.stdout


def test_a_tower_is_a_value(small: Path) -> None:
    tower = load_tower(small)
    assert isinstance(tower, Tower)
    with pytest.raises(AttributeError):
        tower.precision = "float16"  # type: ignore[misc]
