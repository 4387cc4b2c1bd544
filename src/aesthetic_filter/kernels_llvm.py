"""The compiled pass over embedding rows. Imported only when there are rows enough to pay for it.

The pass is written as LLVM vector instructions rather than left to an auto-vectoriser: the order
of the additions is then part of the source (see :mod:`aesthetic_filter.kernels`), float16 widens
in a register, and nothing depends on which loop a compiler chose to unroll. llvmlite, on which
numba stands, turns them into machine code in each process: loading it and compiling take less
than a tenth of a second, where numba's import and its cache take half a second, so nothing has to
be kept on disk. Calls let go of the interpreter lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numpy.typing import NDArray

from aesthetic_filter.kernels import F32, LANES, ODD, PLAIN_SQUARED_NORMS

_UNROLL = 4  # blocks per turn of the inner loop

_I32, _I64, _F32, _F64 = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_BLOCK = ir.VectorType(_F32, LANES)
_ELEMENTS: dict[np.dtype[Any], ir.Type] = {
    np.dtype(np.float16): ir.HalfType(),
    np.dtype(np.float32): _F32,
}


def processor_has_fma() -> bool:
    """Whether fused multiply-adds and float16 conversion are instructions here, not calls."""
    features = _processor_features()
    return bool(features.get("fma") and features.get("f16c")) or bool(features.get("neon"))


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
    run = _compile()[rows.dtype]
    vectors = (weight, reference, scores, norms, cosines)
    return run(rows.ctypes.data, rows.strides[0], *rows.shape, *map(_address, vectors), bias)


def _address(array: F32) -> int:
    if not array.flags.c_contiguous:
        raise ValueError("the compiled pass takes contiguous vectors")
    return array.ctypes.data


@cache
def _compile() -> dict[np.dtype[Any], Callable[..., int]]:
    """Machine code for this processor: one function for each type of element."""
    module = ir.Module()
    for dtype, element in _ELEMENTS.items():
        _write_pass(module, dtype.name, element)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    switches = (f"{'+' if on else '-'}{name}" for name, on in _processor_features().items())
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=",".join(switches), opt=3, jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _keep.append(engine)
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 9, ctypes.c_double)
    return {dtype: kind(engine.get_function_address(dtype.name)) for dtype in _ELEMENTS}


_keep: list[Any] = []
"""The engine owns the machine code."""


@cache
def _processor_features() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # llvmlite cannot tell for every processor
        return {}


def _write_pass(module: ir.Module, name: str, element: ir.Type) -> None:
    """``odd = name(rows, stride, count, width, weight, reference, scores, norms, cosines, bias)``.

    Addresses and the stride, in bytes, are integers: one function serves every layout.
    """
    function = ir.Function(module, ir.FunctionType(_I64, [_I64] * 9 + [_F64]), name)
    rows, stride, count, width, weight, reference, scores, norms, cosines, bias = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    blocks = builder.udiv(width, _I64(LANES))
    square_root = _function(module, "llvm.sqrt.f64", _F64, 1)

    with _loop(builder, _I64(0), count, 1, [_I64(0)]) as (row, [odd], carry_on):
        start = builder.add(rows, builder.mul(row, stride))
        sums = _write_sums(builder, element, start, weight, reference, blocks)
        dot, square, along = (builder.fpext(total, _F64) for total in sums)
        low, high = (_F64(float(np.float32(limit))) for limit in PLAIN_SQUARED_NORMS)
        plain = builder.and_(
            builder.fcmp_ordered(">", square, low), builder.fcmp_ordered("<", square, high)
        )
        norm = builder.call(square_root, [square])

        def store(value: ir.Value, where: ir.Value) -> None:
            pointer = builder.inttoptr(where, _F32.as_pointer())
            builder.store(builder.fptrunc(value, _F32), builder.gep(pointer, [row]))

        store(builder.fadd(builder.fdiv(dot, norm), bias), scores)
        store(builder.select(plain, norm, _F64(ODD)), norms)
        store(builder.fdiv(along, norm), cosines)
        carry_on([builder.add(odd, builder.zext(builder.not_(plain), _I64))])
    builder.ret(odd)


def _write_sums(
    builder: ir.IRBuilder,
    element: ir.Type,
    row: ir.Value,
    weight: ir.Value,
    reference: ir.Value,
    blocks: ir.Value,
) -> list[ir.Value]:
    """``w·x``, ``x·x`` and ``r·x`` of one row, added in the order that kernels.py promises."""
    size = 2 if element is not _F32 else 4
    x = builder.inttoptr(row, ir.VectorType(element, LANES).as_pointer())
    others = [builder.inttoptr(v, _BLOCK.as_pointer()) for v in (weight, reference)]
    fma = _function(builder.module, f"llvm.fma.v{LANES}f32", _BLOCK, 3)

    def add_block(block: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        values = builder.load(builder.gep(x, [block]), align=size)
        if element is not _F32:
            values = builder.fpext(values, _BLOCK)
        w, r = (builder.load(builder.gep(other, [block]), align=4) for other in others)
        return [
            builder.call(fma, [values, factor, total])
            for factor, total in zip((w, values, r), sums, strict=True)
        ]

    unrolled = builder.and_(blocks, _I64(-_UNROLL))
    sums = [ir.Constant(_BLOCK, [0.0] * LANES)] * 3
    with _loop(builder, _I64(0), unrolled, _UNROLL, sums) as (block, sums, carry_on):
        longer = sums
        for step in range(_UNROLL):
            longer = add_block(builder.add(block, _I64(step)), longer)
        carry_on(longer)
    with _loop(builder, unrolled, blocks, 1, sums) as (block, sums, carry_on):
        carry_on(add_block(block, sums))
    return [_fold(builder, total) for total in sums]


def _fold(builder: ir.IRBuilder, lanes: ir.Value) -> ir.Value:
    """Add the upper half of the lanes to the lower until one is left."""
    size = LANES
    while size > 1:
        size //= 2
        lower, upper = (
            builder.shuffle_vector(
                lanes, lanes, ir.Constant(ir.VectorType(_I32, size), list(range(at, at + size)))
            )
            for at in (0, size)
        )
        lanes = builder.fadd(lower, upper)
    return builder.extract_element(lanes, _I32(0))


@contextmanager
def _loop(
    builder: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    step: int,
    carried: Sequence[ir.Value],
) -> Iterator[tuple[ir.Value, list[ir.Value], Callable[[Sequence[ir.Value]], None]]]:
    """A loop from ``start`` up to ``stop``, written by the body of the ``with``.

    Yields the index, the carried values (as they are when a turn begins, and after the loop), and
    what the body calls at its end with the carried values for the next turn.
    """
    before = builder.block
    head, body, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index, *values = (builder.phi(value.type) for value in (start, *carried))
    for phi, value in zip((index, *values), (start, *carried), strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)

    def carry_on(following: Sequence[ir.Value]) -> None:
        following_index = builder.add(index, _I64(step))
        for phi, value in zip((index, *values), (following_index, *following), strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)

    yield index, values, carry_on
    builder.position_at_end(after)


def _function(module: ir.Module, name: str, kind: ir.Type, arguments: int) -> ir.Function:
    """An LLVM intrinsic, declared once in the module."""
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(kind, [kind] * arguments), name)
