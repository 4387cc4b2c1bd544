"""The compiled pass over embedding rows. Imported only when there are rows enough to pay for it.

The sums are written as LLVM vector instructions rather than left to the auto-vectoriser: the
order of the additions is then part of the source (see :mod:`aesthetic_filter.kernels`), float16
widens in a register, and nothing depends on which loop the compiler chose to unroll. Compiled
code is cached on disk, beside the package or in the user's cache directory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numpy.typing import NDArray

from aesthetic_filter.kernels import F32, LANES, ODD, PLAIN_SQUARED_NORMS

_UNROLL = 4  # blocks per turn of the loop


def processor_has_fma() -> bool:
    """Whether fused multiply-adds and float16 conversion are instructions here, not calls."""
    features = get_host_cpu_features()
    return ("+fma" in features and "+f16c" in features) or "+neon" in features


def _three_sums(element: ir.Type) -> Any:
    """A function for compiled code, ``(address, weight, reference) -> (w·x, x·x, r·x)``.

    It reads the row of ``element`` values at ``address`` and adds in the order that kernels.py
    promises.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w_array, r_array = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(sig.args[1:], args[1:], strict=True)
        )
        is_half = isinstance(element, ir.HalfType)
        i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        lanes = ir.VectorType(f32, LANES)
        x_lanes = ir.VectorType(element, LANES)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(lanes, [lanes] * 3), f"llvm.fma.v{LANES}f32"
        )
        x = builder.inttoptr(args[0], x_lanes.as_pointer())
        w = builder.bitcast(w_array.data, lanes.as_pointer())
        r = builder.bitcast(r_array.data, lanes.as_pointer())
        width = cgutils.unpack_tuple(builder, w_array.shape)[0]
        blocks = builder.udiv(width, ir.Constant(i64, LANES))

        zero = ir.Constant(lanes, [0.0] * LANES)
        sums = [cgutils.alloca_once(builder, lanes) for _ in range(3)]
        for accumulator in sums:
            builder.store(zero, accumulator)

        def add_block(block: Any) -> None:
            x_value = builder.load(builder.gep(x, [block]), align=2 if is_half else 4)
            if is_half:
                x_value = builder.fpext(x_value, lanes)
            for accumulator, other in zip(sums, (w, None, r), strict=True):
                y = builder.load(builder.gep(other, [block]), align=4) if other else x_value
                total = builder.call(fma, [x_value, y, builder.load(accumulator)])
                builder.store(total, accumulator)

        nought, one, unroll = (ir.Constant(i64, n) for n in (0, 1, _UNROLL))
        unrolled = builder.sub(blocks, builder.urem(blocks, unroll))
        with cgutils.for_range_slice(builder, nought, unrolled, unroll) as (block, _):
            for step in range(_UNROLL):
                add_block(builder.add(block, ir.Constant(i64, step)))
        with cgutils.for_range_slice(builder, unrolled, blocks, one) as (block, _):
            add_block(block)

        def fold(value: Any) -> Any:
            """Add the upper half of the lanes to the lower until one is left."""
            size = LANES
            while size > 1:
                size //= 2
                lower, upper = (
                    ir.Constant(ir.VectorType(i32, size), list(range(start, start + size)))
                    for start in (0, size)
                )
                value = builder.fadd(
                    builder.shuffle_vector(value, value, lower),
                    builder.shuffle_vector(value, value, upper),
                )
            return builder.extract_element(value, ir.Constant(i32, 0))

        totals = [fold(builder.load(accumulator)) for accumulator in sums]
        return context.make_tuple(builder, sig.return_type, totals)

    def typing(_, address, weight, reference):  # type: ignore[no-untyped-def]
        return types.UniTuple(types.float32, 3)(address, weight, reference), codegen

    return intrinsic(typing)


_half_sums = _three_sums(ir.HalfType())
_single_sums = _three_sums(ir.FloatType())


def _measure_rows(  # type: ignore[no-untyped-def]
    address, stride, half, weight, bias, reference, scores, norms, cosines
):
    # The rows come as an address and a stride, so that one compiled variant serves every layout,
    # read-only memory maps included.
    low, high = PLAIN_SQUARED_NORMS
    odd = 0
    for i in range(scores.shape[0]):
        if half:
            dot, square, along = _half_sums(address + i * stride, weight, reference)
        else:
            dot, square, along = _single_sums(address + i * stride, weight, reference)
        if low < square < high:
            norm = math.sqrt(np.float64(square))
            norms[i] = norm
            scores[i] = np.float64(dot) / norm + bias
            cosines[i] = np.float64(along) / norm
        else:
            norms[i] = ODD
            odd += 1
    return odd


def _apply_layer(x, weight, bias, out):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = np.float32(0)
        for k in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                out[i, j] += x[i, k] * weight[k, j]
        for j in range(weight.shape[1]):
            out[i, j] += bias[j]


def _compile(function: Callable[..., None], signature: str) -> Any:
    jit = partial(numba.njit, signature, nogil=True, error_model="numpy")
    try:
        return jit(cache=True)(function)
    except RuntimeError:  # no folder in which to keep the compiled code: compile in each process
        return jit()(function)


_rows_pass = _compile(
    _measure_rows,
    "int64(int64, int64, b1, f4[::1], f8, f4[::1], f4[::1], f4[::1], f4[::1])",
)


@cache
def layer_pass() -> Callable[[F32, F32, F32, F32], None]:
    """Compile, or load, ``f(x, weight, bias, out)``: one layer of a network, see kernels.py."""
    compiled: Callable[[F32, F32, F32, F32], None] = _compile(
        _apply_layer, "void(f4[:,::1], f4[:,::1], f4[::1], f4[:,::1])"
    )
    return compiled


def measure_rows(
    rows: NDArray[Any],
    weight: F32,
    bias: float,
    reference: F32,
    scores: F32,
    norms: F32,
    cosines: F32,
) -> int:
    """Fill ``scores``, ``norms`` and ``cosines``; return how many rows are odd (see kernels.py).

    Args:
        rows: (N, D) float16 or float32, native byte order, contiguous values, D a multiple of
            ``LANES``; rows may lie any distance apart.
        weight: (D,) float32.
        bias: added after normalisation.
        reference: (D,) float32.
        scores: (N,) float32, filled.
        norms: (N,) float32, filled.
        cosines: (N,) float32, filled.
    """
    address, stride, half = rows.ctypes.data, rows.strides[0], rows.dtype == np.float16
    odd: int = _rows_pass(address, stride, half, weight, bias, reference, scores, norms, cosines)
    return odd
