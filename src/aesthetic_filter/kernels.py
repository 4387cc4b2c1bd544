"""One pass over embedding rows: dot product with a head, norm, and cosine to a reference.

This module knows vectors and nothing else: no files, no heads, no columns.

A row's result is a function of that row alone, bit for bit: not of its neighbours, their number,
the batch, the threads, or whether the compiled pass or the NumPy one computed it. That holds
because the order of every addition is fixed. A row is cut into blocks of ``LANES`` values; lane
``l`` accumulates ``acc[l] = fma(x[block, l], w[block, l], acc[l])`` over the blocks in order, and
the lanes are then added in halves (32 to 16 to 8 ...). Products and sums are float32 with fused
multiply-adds (one rounding); the square root and the division are float64. float16 rows widen
exactly, so the same values give the same bits in either type.

The compiled pass (:mod:`aesthetic_filter.kernels_llvm`) runs at about the speed at which the
machine can read memory, but takes a tenth of a second to load and compile. Small inputs take the
NumPy pass, which emulates the fused multiply-add exactly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32
"""Values per block: two 512-bit or four 256-bit registers of float32."""

COMPILED_FROM_ROWS = 4096
"""After this many rows in a process it is worth loading the compiled pass (about 0.1 s)."""

PLAIN_SQUARED_NORMS = (1e-20, 1e30)
"""Squared norms between which float32 arithmetic neither underflows nor overflows.

Rows outside (rows of zeros, and with NaN or infinity, among them) are odd: they are looked at
again in scaled float64.
"""

ODD = -1.0
"""What a pass writes as the norm of an odd row."""

NOT_FINITE = "embedding holds NaN or infinity"
ALL_ZEROS = "embedding is all zeros"

_NUMPY_BLOCK = 256  # rows whose float64 temporaries stay in the second-level cache
_COMPILED_BLOCK = 32768  # rows a thread takes at a time
_SUPPORTED = {np.dtype(t) for t in (np.float16, np.float32, np.float64)}

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one pass over N rows gives; all arrays are float32 of shape (N,).

    Attributes:
        scores: ``w·x/|x| + b``; NaN where the row has no direction (NaN, infinity, all zeros).
        norms: the row's L2 norm; 0 for a row of zeros, NaN for one with NaN or infinity.
        cosines: the cosine to the reference direction; NaN likewise.
    """

    scores: F32
    norms: F32
    cosines: F32

    def error(self, row: int) -> str | None:
        """Say why ``row`` has no score, or None if it has one."""
        if not np.isnan(self.cosines[row]):
            return None
        return ALL_ZEROS if self.norms[row] == 0 else NOT_FINITE

    @property
    def failed(self) -> NDArray[np.bool_]:
        """Which rows have no direction, hence no score: bool, shape (N,)."""
        return np.isnan(self.cosines)


def measure(
    vectors: NDArray[Any],
    weight: F32,
    bias: float,
    reference: F32,
    *,
    threads: int | None = None,
) -> Measurement:
    """Score, norm and reference cosine of each row, in one pass over the rows as they lie.

    Args:
        vectors: (N, D) float16, float32 or float64, of any strides, memory-mapped or not; rows
            need not be normalised.
        weight: (D,) float32, the head folded to one vector.
        bias: the head's bias, added after normalisation.
        reference: (D,) float32 of unit norm.
        threads: how many threads may share the rows; default: the processors of this process.

    Returns:
        The measurement; a row's values are the same bits in any batch and on any machine.

    Raises:
        TypeError: vectors of another dtype.
        ValueError: vectors of another shape.
    """
    if vectors.dtype.newbyteorder("=") not in _SUPPORTED:
        raise TypeError(f"embeddings must be float16, float32 or float64, not {vectors.dtype}")
    if vectors.ndim != 2 or vectors.shape[1] != weight.shape[0]:
        raise ValueError(f"embeddings must be (N, {weight.shape[0]}), not {vectors.shape}")
    count, width = vectors.shape
    out = Measurement(*(np.empty(count, np.float32) for _ in range(3)))
    compiled = _compiled(count) if width % LANES == 0 else None
    block = _COMPILED_BLOCK if compiled else _NUMPY_BLOCK
    weight, reference = _aligned(weight), _aligned(reference)

    def one_block(start: int) -> None:
        rows = slice(start, min(start + block, count))
        part = vectors[rows]
        plain = _rows_for_the_pass(part)
        into = (out.scores[rows], out.norms[rows], out.cosines[rows])
        if compiled:
            odd = compiled(plain, weight, bias, reference, *into)
        else:
            odd = _numpy_pass(plain, weight, bias, reference, *into)
        if odd:
            _measure_odd_rows(part, weight, bias, reference, *into)

    _spread(one_block, range(0, count, block), threads)
    return out


def layered_scores(
    vectors: NDArray[Any],
    layers: tuple[tuple[F32, F32], ...],
    *,
    threads: int | None = None,
) -> F32:
    """Scores of a network with a ReLU after every layer but the last, on L2-normalised rows.

    Args:
        vectors: (N, D) float16, float32 or float64.
        layers: for each layer the transposed weight (in, out) and the bias (out,), float32.
        threads: as in :func:`measure`.

    Returns:
        (N,) float32; NaN where the row holds NaN or infinity, or is all zeros. Additions run over
        the inputs in order, without fused multiply-adds, so a row's score is the same bits in any
        batch here too.
    """
    count = vectors.shape[0]
    out = np.empty(count, np.float32)
    # A network costs a thousand times a dot product: fewer rows are worth compiling for.
    compiled = _compiled_layers() if count >= COMPILED_FROM_ROWS // 16 else None
    block = 64

    def one_block(start: int) -> None:
        rows = slice(start, min(start + block, count))
        with np.errstate(all="ignore"):
            wide = vectors[rows].astype(np.float64)
            # By the largest value first: no square then leaves float64's range.
            wide /= np.abs(wide).max(axis=1, keepdims=True)
            x = (wide / _float64_norms(wide)[:, None]).astype(np.float32)
        for number, (weight, bias) in enumerate(layers):
            y = np.empty((x.shape[0], weight.shape[1]), np.float32)
            if compiled:
                compiled(x, weight, bias, y)
            else:
                _numpy_layer(x, weight, bias, y)
            x = np.maximum(y, np.float32(0)) if number < len(layers) - 1 else y
        out[rows] = x[:, 0]

    _spread(one_block, range(0, count, block), threads)
    out[np.isnan(out)] = np.nan  # of one sign, whichever pass made it
    return out


def default_threads() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The passes. Each takes rows of native float16 or float32 with contiguous values, fills the three
# outputs, and returns how many rows are odd, marked by their norm.

_Pass = Callable[[NDArray[Any], F32, float, F32, F32, F32, F32], int]


def _numpy_pass(
    rows: NDArray[Any],
    weight: F32,
    bias: float,
    reference: F32,
    scores: F32,
    norms: F32,
    cosines: F32,
) -> int:
    pad = -rows.shape[1] % LANES
    if pad:
        rows = np.pad(rows, ((0, 0), (0, pad)))
        weight, reference = np.pad(weight, (0, pad)), np.pad(reference, (0, pad))
    blocks = (len(rows), -1, LANES)
    with np.errstate(all="ignore"):
        x = rows.astype(np.float32).astype(np.float64).reshape(blocks)
        dots = _lane_sums(x, weight.astype(np.float64).reshape(1, -1, LANES))
        squares = _lane_sums(x, x)
        along = _lane_sums(x, reference.astype(np.float64).reshape(1, -1, LANES))
        norm = np.sqrt(squares.astype(np.float64))
        odd = ~((squares > PLAIN_SQUARED_NORMS[0]) & (squares < PLAIN_SQUARED_NORMS[1]))
        norms[:] = np.where(odd, ODD, norm)
        scores[:] = dots / norm + bias
        cosines[:] = along / norm
    return int(np.count_nonzero(odd))


def _lane_sums(x: NDArray[np.float64], y: NDArray[np.float64]) -> F32:
    """``sum(x*y)`` of float32 values held in float64, in the order the module promises."""
    acc = np.zeros((x.shape[0], LANES), np.float32)
    for block in range(x.shape[1]):
        acc = _fma(x[:, block], y[:, block], acc)
    while acc.shape[1] > 1:
        half = acc.shape[1] // 2
        acc = acc[:, :half] + acc[:, half:]
    return acc[:, 0]


def _fma(a: NDArray[np.float64], b: NDArray[np.float64], c: F32) -> F32:
    """``a*b + c`` rounded once to float32, as the processor's fused multiply-add does.

    The product of two float32 values is exact in float64; the sum is rounded *to odd* there, so
    that rounding it again to float32 gives the correctly rounded result (Boldo and Melquiond,
    "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    product = a * b
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    bits = total.view(np.int64)
    inexact = (error > 0) | (error < 0)
    away = np.where((error > 0) == (total > 0), 1, -1)
    bits += np.where(inexact & (bits & 1 == 0), away, 0)
    return total.astype(np.float32)


def _numpy_layer(x: F32, weight: F32, bias: F32, out: F32) -> None:
    with np.errstate(all="ignore"):
        out[:] = 0
        for i in range(weight.shape[0]):
            out += x[:, i : i + 1] * weight[i]
        out += bias


def _measure_odd_rows(
    vectors: NDArray[Any],
    weight: F32,
    bias: float,
    reference: F32,
    scores: F32,
    norms: F32,
    cosines: F32,
) -> None:
    """The rows marked odd, again, in float64 scaled by a power of two."""
    which = np.flatnonzero(norms == ODD)
    with np.errstate(all="ignore"):
        rows = vectors[which].astype(np.float64)
        largest = np.abs(rows).max(axis=1)
        usable = np.isfinite(largest) & (largest > 0)
        exponent = np.frexp(largest)[1]
        unit = np.ldexp(rows, -np.where(usable, exponent, 0)[:, None])
        norm = _float64_norms(unit)
        # cumsum adds in order, whatever the number of rows: the result is the row's alone.
        dots = (unit * weight).cumsum(axis=1)[:, -1]
        along = (unit * reference).cumsum(axis=1)[:, -1]
        scores[which] = np.where(usable, dots / norm + bias, np.nan)
        cosines[which] = np.where(usable, along / norm, np.nan)
        norms[which] = np.where(usable, np.ldexp(norm, exponent), np.where(largest == 0, 0, np.nan))


def _float64_norms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms: NDArray[np.float64] = np.sqrt(np.square(rows).cumsum(axis=1)[:, -1])
    return norms


def _rows_for_the_pass(rows: NDArray[Any]) -> NDArray[Any]:
    """The same rows as native float16 or float32 with contiguous values; a view where possible."""
    native = np.float32 if rows.dtype.itemsize == 8 else rows.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # beyond float32: infinite here, looked at again in float64
        rows = rows.astype(native, copy=False)
    if rows.shape[1] == 1 or rows.strides[1] == rows.itemsize:
        return rows
    return np.ascontiguousarray(rows)


def _aligned(vector: F32) -> F32:
    """A copy on a 64-byte boundary, so that no load of it crosses a cache line."""
    raw = np.empty(vector.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + vector.nbytes].view(np.float32)
    copy[:] = vector
    return copy


_compiled_pass: _Pass | None = None
_rows_so_far = 0
_loading = threading.Lock()


def _compiled(rows: int) -> _Pass | None:
    """The compiled pass, if it is loaded, or worth loading with so many more rows to come."""
    global _compiled_pass, _rows_so_far
    if _compiled_pass is None:
        with _loading:
            _rows_so_far += rows
            if _compiled_pass is None and _rows_so_far >= COMPILED_FROM_ROWS:
                from aesthetic_filter import kernels_llvm

                has_fma = kernels_llvm.processor_has_fma()  # x86 before 2013 has not
                _compiled_pass = kernels_llvm.measure_rows if has_fma else _numpy_pass
    return _compiled_pass


@cache
def _compiled_layers() -> Callable[[F32, F32, F32, F32], None]:
    from aesthetic_filter import kernels_numba

    return kernels_numba.layer_pass()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="aesthetic-filter-kernel")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _spread(work: Callable[[int], None], starts: range, threads: int | None) -> None:
    threads = threads or default_threads()
    if threads == 1 or len(starts) <= 1:
        for start in starts:
            work(start)
    else:
        for _ in _pool(threads).map(work, starts):
            pass
