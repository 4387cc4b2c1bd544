"""Scores of a torch tensor, on the device it lies on. Imported only when a tensor is handed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aesthetic_filter.kernels import LANES

if TYPE_CHECKING:
    import torch

    from aesthetic_filter.heads.head import Head

_ROWS = 65536  # rows at a time: 200 MB of float32 temporaries


def score(head: Head, embeddings: torch.Tensor) -> torch.Tensor:
    """Score (N, width) or (width,) embeddings; float32 on the same device.

    A tensor in main memory goes through the compiled pass: the same bits as a NumPy array's. On
    an accelerator the lanes are added in the same order, but each product is rounded before it
    is added, so scores may differ from those in the last bits; they too depend on the row alone.
    """
    import torch

    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings must be floating-point, not {embeddings.dtype}")
    with torch.no_grad():
        rows = embeddings.detach()
        rows = rows.unsqueeze(0) if rows.ndim == 1 else rows
        if rows.device.type == "cpu":
            array = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
            measurement = head.measure(array)
            head.warn_if_foreign(measurement.cosines)
            scores = torch.from_numpy(measurement.scores)
        else:
            scores = score_on_device(head, rows)
    return scores[0] if embeddings.ndim == 1 else scores


def score_on_device(head: Head, rows: torch.Tensor) -> torch.Tensor:
    """Score (N, width) rows with torch operations, wherever they lie."""
    import torch

    from aesthetic_filter.heads.head import wrong_width

    if rows.ndim != 2 or rows.shape[1] != head.width:
        raise wrong_width(rows.shape[-1], head)
    on_device = [tuple(torch.tensor(a, device=rows.device) for a in pair) for pair in head.layers]
    reference = head.reference
    direction = None if reference is None else torch.tensor(reference, device=rows.device)
    scores, cosines = [], []
    for part in rows.split(_ROWS):
        # Scaled to a largest value of 1, so that no square leaves float32's range.
        part = part if part.dtype == torch.float64 else part.float()
        largest = part.abs().amax(dim=1, keepdim=True)
        x = (part / largest).float()
        norm = _lane_sums(x, x).sqrt()
        if direction is not None:
            cosines.append((_lane_sums(x, direction) / norm).cpu())
        if head.affine:
            weight, bias = on_device[0]
            scores.append(_lane_sums(x, weight[0]) / norm + bias)
        else:
            scores.append(_layered(x / norm[:, None], on_device))
    if cosines:
        head.warn_if_foreign(torch.cat(cosines).numpy())
    return torch.cat(scores) if scores else rows.new_empty(0, dtype=torch.float32)


def _lane_sums(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    import torch

    pad = -x.shape[-1] % LANES
    x, y = (torch.nn.functional.pad(a, (0, pad)).unflatten(-1, (-1, LANES)) for a in (x, y))
    acc = torch.zeros_like(x[:, 0])
    for block in range(x.shape[1]):
        acc = acc + x[:, block] * y[..., block, :]
    while acc.shape[1] > 1:
        half = acc.shape[1] // 2
        acc = acc[:, :half] + acc[:, half:]
    return acc[:, 0]


def _layered(x: torch.Tensor, layers: list[Any]) -> torch.Tensor:
    # Inputs are added in order rather than by a matrix product, whose blocking, and so rounding,
    # depends on the number of rows.
    for number, (weight, bias) in enumerate(layers):
        y = x.new_zeros(x.shape[0], weight.shape[0])
        for k in range(weight.shape[1]):
            y = y + x[:, k : k + 1] * weight[:, k]
        x = y + bias
        x = x.relu() if number < len(layers) - 1 else x
    return x[:, 0]
