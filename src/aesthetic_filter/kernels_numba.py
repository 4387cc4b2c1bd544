"""Loops, compiled: the layer of a network, and whatever else needs them. Imported only when used.

Compiled code is cached on disk, beside the package or in the user's cache directory. (The pass
over embedding rows, which every run needs, is in :mod:`aesthetic_filter.kernels_llvm` and loads
faster.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np

from aesthetic_filter.kernels import F32


def _apply_layer(x, weight, bias, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = np.float32(0)
        for k in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                out[i, j] += x[i, k] * weight[k, j]
        for j in range(weight.shape[1]):
            out[i, j] += bias[j]


def compiled_loop(function: Callable[..., None], signature: str) -> Any:
    """Compile a function of plain loops for one signature, or load it; it runs without the GIL."""
    jit = partial(numba.njit, signature, nogil=True, error_model="numpy")
    try:
        return jit(cache=True)(function)
    except RuntimeError:  # no folder in which to keep the compiled code: compile in each process
        return jit()(function)


@cache
def layer_pass() -> Callable[[F32, F32, F32, F32], None]:
    """Compile, or load, ``f(x, weight, bias, out)``: one layer of a network, see kernels.py."""
    compiled: Callable[[F32, F32, F32, F32], None] = compiled_loop(
        _apply_layer, "void(f4[:,::1], f4[:,::1], f4[::1], f4[:,::1])"
    )
    return compiled
