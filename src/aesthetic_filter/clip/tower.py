"""CLIP ViT-L/14's vision tower: pixels to embeddings, in plain torch.

As published by OpenAI (https://github.com/openai/CLIP, ``clip/model.py``, MIT): patches, a class
token, pre-norm, blocks with QuickGELU, post-norm of the class token, a projection, and here the
L2 norm. The module knows nothing of files of images, of batches to come, or of scores.

A file does not tell its activation. Towers of the same shape that were trained with the ordinary
GELU (LAION's ViT-L/14, for one) load here and give wrong embeddings: the weights must be OpenAI's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aesthetic_filter.errors import MissingExtraError, UsageError, WeightsError

try:
    import torch
except ImportError:
    raise MissingExtraError("embedding images needs PyTorch", "clip") from None

from torch import Tensor
from torch.nn import functional

IMAGE_SIZE = 224
PATCH = 14
SIDE = IMAGE_SIZE // PATCH
POSITIONS = SIDE**2 + 1
PROJECTION = 768
HEAD_WIDTH = 64
"""The values of one attention head, in every CLIP tower that OpenAI published."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's mean and standard deviation of R, G and B: ``clip/clip.py``, ``_transform``."""

EPSILON = 1e-5
"""Of the layer norms: torch's default, which ``clip/model.py`` takes."""

QUICK = 1.702
"""QuickGELU is ``x * sigmoid(1.702 * x)``: ``clip/model.py``."""

ROWS = 8
"""How many tokens the last block computes; only the first, the class token, is used.

The others would be a waste (a thousandth of the work), but the libraries compute a product of few
rows another way, with other rounding, and then an image's embedding would depend on how many stand
beside it. With eight it did not, bit for bit, wherever it was measured (PyTorch 2.13 on AVX-512).
"""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What the products inside the blocks may be computed in."""

CPU_BATCH = 4
"""How many images to give a tower on a processor at a time.

Measured on two cores of an AMD EPYC (AVX-512, native bfloat16), a block at a time: from 1 to 16
images bfloat16 is as fast within the noise of 5%; float32 gains 15% up to 4 images, then no more.
``benchmarks/bench_tower.py --batches`` measures it again.
"""

Pair = tuple[Tensor, Tensor]
"""A weight and a bias."""


class Stopped(Exception):  # noqa: N818  (no error: it was asked for)
    """The tower was told to stop between two blocks."""


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block: ``width`` W, ``mlp`` M.

    Attributes:
        norm1: (W,), (W,) float32.
        qkv: (3W, W), (3W,): queries, keys and values in one product.
        out: (W, W), (W,).
        norm2: (W,), (W,) float32.
        fc1: (M, W), (M,), both times 1.702; see :func:`_block`.
        fc2: (W, M), divided by 1.702, and (W,).
    """

    norm1: Pair
    qkv: Pair
    out: Pair
    norm2: Pair
    fc1: Pair
    fc2: Pair


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision tower of ``width`` W, ready on its device. Make one with :func:`load_tower`.

    Attributes:
        patches: (W, 588) float32; a patch is (channel, row, column), flattened.
        class_token: (W,) float32.
        positions: (257, W) float32, the class token's first.
        pre_norm: (W,), (W,) float32.
        blocks: one or more; their products run in ``precision``.
        post_norm: (W,), (W,) float32.
        projection: (768, W) float32.
        device: where it lies.
        precision: "float32", "bfloat16" or "float16": what the products and the attention of the
            blocks run in. The residual stream, the norms, the patches and the projection are
            float32 in any case.
    """

    patches: Tensor
    class_token: Tensor
    positions: Tensor
    pre_norm: Pair
    blocks: tuple[Block, ...]
    post_norm: Pair
    projection: Tensor
    device: torch.device
    precision: str

    def __repr__(self) -> str:
        width = len(self.class_token)
        return f"Tower({len(self.blocks)} blocks, width {width}, {self.precision}, {self.device})"

    def __call__(self, images: Tensor, *, should_stop: Callable[[], bool] | None = None) -> Tensor:
        """Embed images.

        Args:
            images: (N, 224, 224, 3) uint8 RGB, or (N, 3, 224, 224) floating-point, already
                normalised (see :func:`normalise`), through which gradients flow; on any device.
            should_stop: asked before each block.

        Returns:
            (N, 768) float32 on the tower's device, each row of unit norm.

        Raises:
            Stopped: ``should_stop`` returned True.
            ValueError: the images have another shape or dtype.
        """
        x = images.to(self.device)
        x = x.float() if x.is_floating_point() else normalise(x)
        if x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"normalised images are (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), not {tuple(x.shape)}"
            )
        # A product rather than a convolution, which CUDA would round to TensorFloat-32.
        x = x.unflatten(3, (SIDE, PATCH)).unflatten(2, (SIDE, PATCH))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = functional.linear(x, self.patches)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        stream = _norm(x, self.pre_norm)
        for number, block in enumerate(self.blocks):
            if should_stop is not None and should_stop():
                raise Stopped
            stream = _block(stream, block, last=number == len(self.blocks) - 1)
        embeddings = functional.linear(_norm(stream, self.post_norm), self.projection)[:, 0]
        return functional.normalize(embeddings, dim=-1)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels as CLIP wants them: 0 to 1, less the mean, over the standard deviation.

    Args:
        pixels: (N, 224, 224, 3) uint8, RGB.

    Returns:
        (N, 3, 224, 224) float32, the same as torchvision's ``ToTensor`` and ``Normalize`` give.

    Raises:
        ValueError: the pixels have another shape or dtype.
    """
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"pixels are (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3) uint8, "
            f"not {tuple(pixels.shape)} {pixels.dtype}"
        )
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(mean).div_(std)


def _norm(x: Tensor, pair: Pair) -> Tensor:
    return functional.layer_norm(x, pair[0].shape, *pair, eps=EPSILON)


def _block(stream: Tensor, block: Block, *, last: bool) -> Tensor:
    """One block on the residual stream (N, tokens, W) float32; of the last the first few tokens.

    The 1.702 of QuickGELU is in the weights: silu(1.702 x) / 1.702 is the same function, and one
    pass over the widest activations instead of three.
    """
    weight, bias = block.qkv
    width = stream.shape[-1]
    x = _norm(stream, block.norm1).to(weight.dtype)
    if last:  # these few ask all the others
        # Contiguous, as one image's rows are anyway: else the bias is added in another step.
        stream = stream[:, :ROWS]
        q = functional.linear(x[:, :ROWS].contiguous(), weight[:width], bias[:width])
        k, v = functional.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
    else:
        q, k, v = functional.linear(x, weight, bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for part in (q, k, v))
    x = _attention(q, k, v).transpose(1, 2).flatten(2)
    stream = stream + functional.linear(x, *block.out)
    x = functional.linear(_norm(stream, block.norm2).to(weight.dtype), *block.fc1)
    x = functional.silu(x, inplace=not x.requires_grad)
    return stream + functional.linear(x, *block.fc2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax of q·k over the square root of 64, times v; each (N, heads, tokens, 64)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(q, k, v)
    # The same in two products: on a processor three quarters of the time of PyTorch's function,
    # which is slower in bfloat16 than in float32. As there, the scores are float32. Image by
    # image, so that they stay in the cache.
    found = []
    for queries, keys, values in zip(q, k, v, strict=True):
        scores = (queries.float() * HEAD_WIDTH**-0.5) @ keys.float().transpose(1, 2)
        found.append(scores.softmax(-1).to(v.dtype) @ values)
    return torch.stack(found) if found else q


# Where, and in what precision.


def use_processors(count: int) -> None:
    """Let the products on this machine's processors have so many threads."""
    torch.set_num_threads(count)


def resolve_device(name: str) -> list[torch.device]:
    """The devices that a name stands for.

    Args:
        name: "auto": all CUDA devices, else "mps" where there is one, else "cpu". "cuda": all CUDA
            devices. Or one of them: "cuda:1", "mps", "cpu".

    Raises:
        UsageError: no such device is there.
    """
    cuda = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    mps = [torch.device("mps")] if torch.backends.mps.is_available() else []
    cpu = [torch.device("cpu")]
    choices = {"auto": cuda or mps or cpu, "cuda": cuda, "mps": mps, "cpu": cpu}
    choices |= {str(device): [device] for device in cuda}
    if found := choices.get(name):
        return found
    there = ", ".join(str(device) for device in (*cuda, *mps, *cpu))
    raise UsageError(f'no device "{name}" here; there is: {there}; or say "auto"')


def choose_precision(device: torch.device | str) -> str:
    """The precision that "auto" means on a device: the fastest that is exact enough.

    CUDA: float16, as OpenAI ran the model (``convert_weights`` in ``clip/model.py``), whose
    activations stay in its range; it keeps 10 bits of the mantissa where bfloat16 keeps 7, at the
    same speed. CPU: bfloat16 where this processor multiplies it at least 1.5 times as fast as
    float32, which is tried out (tens of milliseconds); else float32. Elsewhere float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "float16"
    if kind != "cpu":
        return "float32"
    best = dict.fromkeys(("float32", "bfloat16"), math.inf)
    inputs = {name: torch.ones(POSITIONS, 1024, dtype=DTYPES[name]) for name in best}
    weights = {name: torch.ones(1024, 1024, dtype=DTYPES[name]) for name in best}
    # Taking turns: a noisy moment hits both; the first time is a warm-up. Processor time, not the
    # clock's: what else the machine does must not make the next run choose otherwise.
    for _ in range(12):
        for name in best:
            started = time.process_time()
            functional.linear(inputs[name], weights[name])
            best[name] = min(best[name], time.process_time() - started)
    return "bfloat16" if best["float32"] >= 1.5 * best["bfloat16"] else "float32"


# Reading the weights.

WANTED = "the model.safetensors of openai/clip-vit-large-patch14, or open_clip's ViT-L-14 of OpenAI"

HUGGING_FACE = {
    "class_token": "vision_model.embeddings.class_embedding",
    "patches": "vision_model.embeddings.patch_embedding.weight",
    "positions": "vision_model.embeddings.position_embedding.weight",
    "pre_norm": "vision_model.pre_layrnorm.{kind}",
    "norm1": "vision_model.encoder.layers.{n}.layer_norm1.{kind}",
    "q": "vision_model.encoder.layers.{n}.self_attn.q_proj.{kind}",
    "k": "vision_model.encoder.layers.{n}.self_attn.k_proj.{kind}",
    "v": "vision_model.encoder.layers.{n}.self_attn.v_proj.{kind}",
    "out": "vision_model.encoder.layers.{n}.self_attn.out_proj.{kind}",
    "norm2": "vision_model.encoder.layers.{n}.layer_norm2.{kind}",
    "fc1": "vision_model.encoder.layers.{n}.mlp.fc1.{kind}",
    "fc2": "vision_model.encoder.layers.{n}.mlp.fc2.{kind}",
    "post_norm": "vision_model.post_layernorm.{kind}",
    "projection": "visual_projection.weight",
}
"""Hugging Face transformers' names: ``CLIPModel``, and ``CLIPVisionModelWithProjection``."""

OPEN_CLIP = {
    "class_token": "visual.class_embedding",
    "patches": "visual.conv1.weight",
    "positions": "visual.positional_embedding",
    "pre_norm": "visual.ln_pre.{kind}",
    "norm1": "visual.transformer.resblocks.{n}.ln_1.{kind}",
    "qkv": "visual.transformer.resblocks.{n}.attn.in_proj_{kind}",
    "out": "visual.transformer.resblocks.{n}.attn.out_proj.{kind}",
    "norm2": "visual.transformer.resblocks.{n}.ln_2.{kind}",
    "fc1": "visual.transformer.resblocks.{n}.mlp.c_fc.{kind}",
    "fc2": "visual.transformer.resblocks.{n}.mlp.c_proj.{kind}",
    "post_norm": "visual.ln_post.{kind}",
    "projection": "visual.proj",
}
"""open_clip's names, which are OpenAI's own; the projection is (W, 768) here."""

IGNORED = re.compile(
    r"text_model\.|text_projection(\.weight)?$|logit_(scale|bias)$"
    r"|vision_model\.embeddings\.position_ids$"
    r"|transformer\.|token_embedding\.weight$|positional_embedding$|ln_final\."
)
"""The tensors beside the vision tower: the text tower's, in both layouts, and two constants."""


def load_tower(
    path: Path, *, device: torch.device | str = "cpu", precision: str = "float32"
) -> Tower:
    """Read the vision tower out of a CLIP safetensors file; the rest of it is not read.

    Args:
        path: the weights of CLIP ViT-L/14, float32, float16 or bfloat16, under the names of
            Hugging Face transformers or of open_clip.
        device: where the tower is to lie.
        precision: "float32", "bfloat16" or "float16"; see :class:`Tower`.

    Raises:
        WeightsError: the file is not safetensors or cannot be read; it is another model; or a
            tensor is missing, unknown, or has another shape or type.
        UsageError: there is no such precision.
    """
    from safetensors import SafetensorError, safe_open

    if precision not in DTYPES:
        raise UsageError(f'no precision "{precision}": choose one of {", ".join(DTYPES)}')
    try:
        with safe_open(path, framework="pt") as file:
            names = _check(path, file)
            return _read(file, names, torch.device(device), precision)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: not a safetensors file that can be read ({error}); wanted is {WANTED}"
        ) from None


def _read(file: Any, names: dict[str, str], device: torch.device, precision: str) -> Tower:
    def read(
        *keys: str, n: int = 0, kind: str = "", scale: float = 1, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        # Put together in new memory, even if it is only one: what the file gives is mapped, and
        # would die with it.
        found = [file.get_tensor(names[key].format(n=n, kind=kind)).float() for key in keys]
        return torch.cat(found).mul_(scale).to(device, dtype)

    def norm(key: str, n: int = 0) -> Pair:
        return read(key, n=n, kind="weight"), read(key, n=n, kind="bias")

    def linear(*keys: str, n: int, weight_scale: float = 1, bias_scale: float = 1) -> Pair:
        dtype = DTYPES[precision]
        weight = read(*keys, n=n, kind="weight", scale=weight_scale, dtype=dtype)
        return weight, read(*keys, n=n, kind="bias", scale=bias_scale, dtype=dtype)

    def block(n: int) -> Block:
        return Block(
            norm1=norm("norm1", n),
            qkv=linear(*(("qkv",) if "qkv" in names else "qkv"), n=n),
            out=linear("out", n=n),
            norm2=norm("norm2", n),
            fc1=linear("fc1", n=n, weight_scale=QUICK, bias_scale=QUICK),
            fc2=linear("fc2", n=n, weight_scale=1 / QUICK),
        )

    projection = read("projection")
    return Tower(
        patches=read("patches").flatten(1),
        class_token=read("class_token"),
        positions=read("positions"),
        pre_norm=norm("pre_norm"),
        blocks=tuple(block(n) for n in range(_layers(file.keys(), names))),
        post_norm=norm("post_norm"),
        projection=projection.T.contiguous() if names is OPEN_CLIP else projection,
        device=device,
        precision=precision,
    )


def _check(path: Path, file: Any) -> dict[str, str]:
    """The layout of the file, which holds all that it must and nothing unknown."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
    names = HUGGING_FACE if any(name.startswith("vision_model.") for name in shapes) else OPEN_CLIP
    if not any(name.startswith(("vision_model.", "visual.")) for name in shapes):
        raise WeightsError(
            f"{path}: no vision tower of CLIP: it holds {_some(shapes)}; wanted is {WANTED}"
        )
    for key in ("patches", "class_token", "positions", "projection", "fc1"):
        name = names[key].format(n=0, kind="weight")
        if name not in shapes:
            raise WeightsError(f"{path}: the tensor {name} is missing; wanted is {WANTED}")
    if is_instead := _another_model(names, shapes):
        raise WeightsError(f"{path}: {is_instead}; wanted is {WANTED}")
    expected = _expected_shapes(names, shapes)
    if missing := expected.keys() - shapes.keys():
        raise WeightsError(f"{path}: without {_some(missing)}, which the vision tower needs")
    if extra := {name for name in shapes.keys() - expected.keys() if not IGNORED.match(name)}:
        raise WeightsError(
            f"{path}: {_some(extra)} is not of CLIP ViT-L/14: another model; wanted is {WANTED}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise WeightsError(f"{path}: {name} is {shapes[name]}; it must be {shape}")
        if (dtype := slices[name].get_dtype()) not in ("F32", "F16", "BF16"):
            raise WeightsError(
                f"{path}: {name} is of type {dtype}; it must be float32, float16 or bfloat16"
            )
    return names


def _another_model(names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> str:
    """In words, what makes this another model than ViT-L/14; "" where nothing does."""
    patches, positions, projection = (
        shapes[names[key]] for key in ("patches", "positions", "projection")
    )
    if len(patches) == 4 and patches[2] != PATCH:
        return f"its patches are {patches[2]} pixels wide, those of ViT-L/14 {PATCH}"
    side = math.isqrt(max(positions[0] - 1, 0))
    if side != SIDE and side**2 == positions[0] - 1:
        return f"is for {side * PATCH}-pixel images; {IMAGE_SIZE} pixels are needed"
    wide = projection[-1 if names is OPEN_CLIP else 0]
    if wide != PROJECTION:
        return f"gives {wide}-d embeddings; the aesthetic heads take {PROJECTION}"
    width = shapes[names["class_token"]][0]
    if width % HEAD_WIDTH:
        return f"its width is {width}, no multiple of {HEAD_WIDTH}"
    return ""


def _expected_shapes(
    names: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Every tensor that a tower of this size has, and its shape."""
    (w,) = shapes[names["class_token"]]
    mlp = shapes[names["fc1"].format(n=0, kind="weight")][0]
    weights: dict[str, tuple[int, ...]] = {
        "class_token": (w,),
        "patches": (w, 3, PATCH, PATCH),
        "positions": (POSITIONS, w),
        "pre_norm": (w,),
        "norm1": (w,),
        "qkv": (3 * w, w),
        **dict.fromkeys(("q", "k", "v", "out"), (w, w)),
        "norm2": (w,),
        "fc1": (mlp, w),
        "fc2": (w, mlp),
        "post_norm": (w,),
        "projection": (w, PROJECTION) if names is OPEN_CLIP else (PROJECTION, w),
    }
    expected = {}
    for key, name in names.items():
        for n in range(_layers(shapes, names)) if "{n}" in name else [0]:
            expected[name.format(n=n, kind="weight")] = weights[key]
            if "{kind}" in name:
                expected[name.format(n=n, kind="bias")] = weights[key][:1]
    return expected


def _layers(present: Iterable[str], names: dict[str, str]) -> int:
    """How many blocks there are: one more than the highest number."""
    before = names["out"].partition("{n}")[0]
    numbers = (re.match(re.escape(before) + r"(\d+)\.", name) for name in present)
    return 1 + max((int(found[1]) for found in numbers if found), default=0)


def _some(names: Iterable[str]) -> str:
    """The names, or the first three of many."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "no tensors") + more
