"""The aesthetic score as a differentiable reward, for fine-tuning and guidance."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from aesthetic_filter.clip.tower import IMAGE_SIZE, MEAN, STD, load_tower
from aesthetic_filter.clip.weights import encoder_weights
from aesthetic_filter.heads.head import Head
from aesthetic_filter.heads.load import load_head

import torch  # isort: skip  (after the tower, which says what to install where it is missing)


class AestheticReward(torch.nn.Module):
    """Predict how much people like images, differentiably.

    ``AestheticReward()(images)`` is (N,) float32 for (N, 3, H, W) images in [0, 1]; its gradient
    flows to the pixels, and its own weights are frozen. Images that are 224 x 224 already are
    scored as :class:`ImageScorer` scores them, but for the rounding of the embedding to float16;
    others are resized by torch's antialiased bicubic filter, which is close to Pillow's.

    Args:
        head: a head, or what :func:`load_head` takes; default: the reference head.
        model_dir: where weights from the hub are kept; default: the hub's own cache.
        weights: the encoder's; see :class:`ImageOptions`.
        device: where to; the module moves like any other.
        precision: of the encoder's products; "float32" gives the best gradients.

    Raises:
        DownloadError: the encoder's weights are neither here nor to be had.
        MissingExtraError: torch is not installed.
    """

    def __init__(
        self,
        head: Head | str | Path | None = None,
        *,
        model_dir: str | Path | None = None,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        head = head if isinstance(head, Head) else load_head(head, model_dir=model_dir)
        found = encoder_weights(weights, model_dir=model_dir)
        self.tower = load_tower(found.path, device=device, precision=precision)
        for number, (weight, bias) in enumerate(head.layers):
            self.register_buffer(f"head_weight_{number}", torch.tensor(weight, device=device))
            self.register_buffer(f"head_bias_{number}", torch.tensor(bias, device=device))
        self._layers = len(head.layers)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Score images.

        Args:
            images: (N, 3, H, W) floating-point in [0, 1], on the module's device.

        Returns:
            (N,) float32.

        Raises:
            ValueError: the images have another shape.
            TypeError: they are not floating-point.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are (N, 3, H, W), not {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images are floating-point in [0, 1], not {images.dtype}")
        x = self.tower(_normalised(_cropped(images.float())))
        for number in range(self._layers):
            x = torch.nn.functional.linear(
                x, self._buffer("weight", number), self._buffer("bias", number)
            )
            x = x.relu() if number < self._layers - 1 else x
        return x[:, 0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the tower too, where the module is moved to another device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self._buffer("weight", 0).device
        if device != self.tower.device:
            self.tower = _moved(self.tower, device)
        return self

    def _buffer(self, kind: str, number: int) -> torch.Tensor:
        found: Any = getattr(self, f"head_{kind}_{number}")
        tensor: torch.Tensor = found
        return tensor.float()


def _moved(part: Any, device: torch.device) -> Any:
    """The same tower, or a part of one, on another device."""
    if isinstance(part, torch.Tensor):
        return part.to(device)
    if isinstance(part, tuple):
        return tuple(_moved(item, device) for item in part)
    if isinstance(part, torch.device):
        return device
    if is_dataclass(part) and not isinstance(part, type):
        values = {f.name: _moved(getattr(part, f.name), device) for f in fields(part)}
        return replace(part, **values)
    return part


def _cropped(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) to (N, 3, 224, 224): shortest side 224, then the centre."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != IMAGE_SIZE:
        size = [IMAGE_SIZE * side // short for side in (height, width)]
        images = torch.nn.functional.interpolate(
            images, size, mode="bicubic", antialias=True
        ).clamp(0, 1)
    height, width = images.shape[-2:]
    top, left = round((height - IMAGE_SIZE) / 2), round((width - IMAGE_SIZE) / 2)
    return images[:, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]


def _normalised(images: torch.Tensor) -> torch.Tensor:
    mean = images.new_tensor(MEAN)[:, None, None]
    return (images - mean) / images.new_tensor(STD)[:, None, None]
