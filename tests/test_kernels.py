"""A row's result is the row's alone, bit for bit, and it is the right one."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aesthetic_filter import kernels, kernels_llvm, kernels_numba

WIDTH = 768
PASSES = ("numpy", "compiled")

_random = np.random.default_rng(20)
WEIGHT = _random.standard_normal(WIDTH).astype(np.float32)
BIAS = 5.2366
REFERENCE = _random.standard_normal(WIDTH)
REFERENCE = (REFERENCE / np.linalg.norm(REFERENCE)).astype(np.float32)

several = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@contextmanager
def forced(which: str) -> Iterator[None]:
    """Measure with one of the two passes, however many rows there are."""
    one = {"numpy": None, "compiled": kernels_llvm.measure_rows}[which]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_compiled", lambda _rows: one)
        yield


def bits(
    vectors: NDArray[Any], which: str | None = None, threads: int | None = None
) -> NDArray[np.uint32]:
    """Scores, norms and cosines as (3, N) integers, so that NaN equals NaN and 0 is not -0."""
    if which is None:
        found = kernels.measure(vectors, WEIGHT, BIAS, REFERENCE, threads=threads)
    else:
        with forced(which):
            found = kernels.measure(vectors, WEIGHT, BIAS, REFERENCE, threads=threads)
    return np.stack([found.scores, found.norms, found.cosines]).view(np.uint32)


def rows_of(count: int, seed: int, dtype: Any = np.float16) -> NDArray[Any]:
    """Rows of many sizes, some of them odd: zeros, NaN, infinity, huge, tiny."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, WIDTH))
    vectors *= 10.0 ** random.uniform(-2, 1.5, (count, 1))
    with np.errstate(over="ignore", under="ignore"):
        vectors = vectors.astype(dtype)
        for row in np.flatnonzero(random.random(count) < 0.1):
            kind = random.integers(4)
            if kind == 0:
                vectors[row] = 0
            elif kind < 3:
                vectors[row, random.integers(WIDTH)] = (np.nan, -np.inf)[kind - 1]
            else:
                vectors[row] *= np.array(np.finfo(dtype).smallest_subnormal, dtype)
    return vectors


def exact(vectors: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
    """Scores, norms and cosines in float64, for rows whose squares float64 can hold."""
    wide = vectors.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    unit = wide / norms[:, None]
    return unit @ WEIGHT.astype(np.float64) + BIAS, norms, unit @ REFERENCE.astype(np.float64)


# A row's result is the row's alone.


@several
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 700),
    cuts=st.lists(st.integers(0, 700), max_size=6),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    which=st.sampled_from(PASSES),
)
def test_any_split_into_batches_gives_the_same_bits(
    seed: int, count: int, cuts: list[int], dtype: Any, which: str
) -> None:
    vectors = rows_of(count, seed, dtype)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = [bits(vectors[a:b], which) for a, b in itertools.pairwise(edges)]
    assert np.array_equal(np.concatenate(parts, axis=1), bits(vectors, which))


@several
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 600),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_the_numpy_pass_and_the_compiled_one_give_the_same_bits(
    seed: int, count: int, dtype: Any
) -> None:
    vectors = rows_of(count, seed, dtype)
    assert np.array_equal(bits(vectors, "numpy"), bits(vectors, "compiled"))


@several
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=96), seed=st.integers(0, 99))
def test_the_two_passes_agree_on_any_values_at_all(values: list[float], seed: int) -> None:
    row = np.random.default_rng(seed).choice(np.array(values, np.float32), (3, WIDTH))
    assert np.array_equal(bits(row, "numpy"), bits(row, "compiled"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_one_row_alone_is_the_same_bits_as_among_ten_thousand(dtype: Any) -> None:
    vectors = rows_of(kernels.COMPILED_FROM_ROWS + 1817, 3, dtype)
    together = bits(vectors)
    for row in (0, 1, 255, 256, 4095, 4096, len(vectors) - 1):
        for which in PASSES:
            assert np.array_equal(bits(vectors[row : row + 1], which)[:, 0], together[:, row])


def test_crossing_over_to_the_compiled_pass_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_compiled_pass", None)
    monkeypatch.setattr(kernels, "_rows_so_far", 0)
    vectors = rows_of(kernels.COMPILED_FROM_ROWS - 1, 4)
    below = bits(vectors)
    assert kernels._compiled_pass is None, "a small input does not wait for the compiler"
    above = bits(np.concatenate([vectors, vectors[:1]]))
    assert kernels._compiled_pass is not None
    assert np.array_equal(above[:, :-1], below)
    assert np.array_equal(above[:, -1], below[:, 0])


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("threads", [2, 3, 4, None])
def test_any_number_of_threads_gives_the_same_bits(
    which: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_COMPILED_BLOCK", 500)  # blocks enough to go round
    vectors = rows_of(3001, 5)
    assert np.array_equal(bits(vectors, which, threads), bits(vectors, which, 1))


@several
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 300))
def test_float16_gives_the_bits_of_the_same_values_in_float32_and_float64(
    seed: int, count: int
) -> None:
    vectors = rows_of(count, seed, np.float16)
    for which in PASSES:
        half = bits(vectors, which)
        assert np.array_equal(bits(vectors.astype(np.float32), which), half)
        assert np.array_equal(bits(vectors.astype(np.float64), which), half)


def layouts(vectors: NDArray[Any], folder: Path) -> dict[str, NDArray[Any]]:
    """The same values as they may lie in memory."""
    count, width = vectors.shape
    spread = np.full((3 * count, 2 * width), np.nan, vectors.dtype)
    spread[1::3, ::2] = vectors
    beside = np.full((count, width + 5), np.nan, vectors.dtype)
    beside[:, 5:] = vectors
    raw = np.empty(vectors.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(vectors.dtype).reshape(vectors.shape)
    unaligned[:] = vectors
    locked = vectors.copy()
    locked.setflags(write=False)
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "fortran.npy", np.asfortranarray(vectors))
    return {
        "Fortran order": np.asfortranarray(vectors),
        "every third row, every second value": spread[1::3, ::2],
        "columns of a wider array": beside[:, 5:],
        "reversed rows": vectors[::-1].copy()[::-1],
        "reversed values": vectors[:, ::-1].copy()[:, ::-1],
        "read-only": locked,
        "unaligned": unaligned,
        "big-endian": vectors.astype(vectors.dtype.newbyteorder(">")),
        "memory-mapped": np.load(folder / "vectors.npy", mmap_mode="r"),
        "memory-mapped, Fortran order": np.load(folder / "fortran.npy", mmap_mode="r"),
    }


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_layout_in_memory_gives_the_same_bits(which: str, dtype: Any, tmp_path: Path) -> None:
    vectors = rows_of(300, 6, dtype)
    expected = bits(vectors.copy(), which)
    for name, same in layouts(vectors, tmp_path).items():
        before = same.copy()
        assert np.array_equal(bits(same, which), expected), name
        assert np.array_equal(same, before, equal_nan=True), f"{name}: the input was written to"


def test_one_row_repeated_by_a_stride_of_zero() -> None:
    row = rows_of(1, 7, np.float32)
    for which in PASSES:
        repeated = bits(np.broadcast_to(row, (40, WIDTH)), which)
        assert np.array_equal(repeated, np.repeat(bits(row, which), 40, axis=1))


@several
@given(width=st.integers(1, 130), count=st.integers(1, 20), seed=st.integers(0, 999))
def test_any_width_is_measured_rightly(width: int, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, width)).astype(np.float32)
    weight, reference = random.standard_normal((2, width)).astype(np.float32)
    found = kernels.measure(vectors, weight, 1.5, reference)
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(found.scores, unit @ weight.astype(np.float64) + 1.5, atol=1e-5)
    np.testing.assert_allclose(found.cosines, unit @ reference.astype(np.float64), atol=1e-5)


def test_narrower_registers_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # 256 bits rather than 512: other instructions and another schedule, the same additions.
    has = kernels_llvm._processor_features()
    if not has.get("avx512f"):
        pytest.skip("this processor has no registers of 512 bits")
    less = {name: on and not name.startswith("avx512") for name, on in has.items()}
    vectors = {dtype: rows_of(500, 11, dtype) for dtype in (np.float16, np.float32)}
    expected = {dtype: bits(rows, "compiled") for dtype, rows in vectors.items()}
    monkeypatch.setattr(kernels_llvm, "_processor_features", lambda: less)
    compiled = kernels_llvm._compile.__wrapped__()
    monkeypatch.setattr(kernels_llvm, "_compile", lambda: compiled)
    for dtype, rows in vectors.items():
        assert np.array_equal(bits(rows, "compiled"), expected[dtype])


def test_a_processor_without_the_instructions_takes_the_numpy_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_compiled_pass", None)
    monkeypatch.setattr(kernels, "_rows_so_far", 0)
    monkeypatch.setattr(kernels_llvm, "_processor_features", lambda: {"avx2": True, "fma": False})
    vectors = rows_of(kernels.COMPILED_FROM_ROWS, 17)
    found = bits(vectors)
    assert kernels._compiled_pass is kernels._numpy_pass
    assert np.array_equal(found[:, ::500], bits(vectors[::500], "compiled"))


FIRST_CALLS = """
import hashlib, numpy as np
from concurrent.futures import ThreadPoolExecutor
from aesthetic_filter import kernels
kernels._COMPILED_BLOCK = 100
random = np.random.default_rng(11)
vectors = random.standard_normal((kernels.COMPILED_FROM_ROWS, 768)).astype(np.float16)
weight, reference = random.standard_normal((2, 768)).astype(np.float32)
def digest(_):
    found = kernels.measure(vectors, weight, 1.0, reference, threads=4)
    return hashlib.sha256(found.scores.tobytes() + found.norms.tobytes()).hexdigest()
with ThreadPoolExecutor(4) as pool:
    print(*set(pool.map(digest, range(4))), kernels._compiled_pass.__name__)
"""


def test_first_calls_from_many_threads_at_once_give_the_same_bits() -> None:
    random = np.random.default_rng(11)
    vectors = random.standard_normal((kernels.COMPILED_FROM_ROWS, WIDTH)).astype(np.float16)
    weight, reference = random.standard_normal((2, WIDTH)).astype(np.float32)
    with forced("numpy"):
        here = kernels.measure(vectors, weight, 1.0, reference)
    expected = hashlib.sha256(here.scores.tobytes() + here.norms.tobytes()).hexdigest()
    ran = subprocess.run(
        [sys.executable, "-c", FIRST_CALLS],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ran.stdout.split() == [expected, "measure_rows"]


# The emulated fused multiply-add.


def rounded_to_float32(value: Fraction) -> float:
    """The float32 nearest to an exact number, ties to even; by integer arithmetic alone."""
    if value == 0:
        return 0.0
    sign, size = (-1, -value) if value < 0 else (1, value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1  # now 2**exponent <= size < 2**(exponent + 1)
    unit = Fraction(2) ** max(exponent - 23, -149)
    steps = round(size / unit)  # Fraction's round is to even
    return math.copysign(float(steps * unit), sign)


singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-4, 4, width=32, allow_subnormal=False)


@settings(max_examples=400, deadline=None)
@given(a=singles | ordinary, b=singles | ordinary, c=singles | ordinary)
# A product that lies half way between two float32 but for a sum far below float64's last bit.
@example(a=1 + 2**-12, b=1 + 2**-12, c=2**-80)
@example(a=1 + 2**-12, b=1 + 2**-12, c=-(2**-80))
@example(a=-(1 + 2**-12), b=1 + 2**-12, c=2**-80)
@example(a=2**-75, b=2**-75, c=2**-149)
@example(a=1.0, b=2**-24, c=1.0)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    expected = rounded_to_float32(Fraction(a) * Fraction(b) + Fraction(c))
    if abs(expected) > float(np.finfo(np.float32).max):
        expected = math.copysign(math.inf, expected)
    with np.errstate(all="ignore"):
        found = kernels._fma(np.array([a]), np.array([b]), np.array([c], np.float32))
    assert found.dtype == np.float32
    assert float(found[0]) == expected


def test_fma_of_a_million_products_that_round_twice_in_float64() -> None:
    # Products near the middle between two float32, where float64's own rounding would mislead.
    random = np.random.default_rng(8)
    a = (1 + random.integers(0, 2**11, 4000) * 2.0**-12).astype(np.float32)
    b = (1 + random.integers(0, 2**11, 4000) * 2.0**-12).astype(np.float32)
    c = (random.choice([-1, 1], 4000) * 2.0 ** random.integers(-90, -20, 4000)).astype(np.float32)
    found = kernels._fma(a.astype(np.float64), b.astype(np.float64), c)
    expected = [
        rounded_to_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert found.tolist() == expected
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (naive != found).any(), "these cases should tell one rounding from two"


# The right numbers.


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_close_to_float64(which: str, dtype: Any) -> None:
    random = np.random.default_rng(9)
    vectors = random.standard_normal((2000, WIDTH)) * 10.0 ** random.uniform(-1, 2, (2000, 1))
    vectors = vectors.astype(dtype)
    with forced(which):
        found = kernels.measure(vectors, WEIGHT, BIAS, REFERENCE)
    scores, norms, cosines = exact(vectors)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=3e-6)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(found.cosines, cosines, rtol=0, atol=2e-7)
    assert not found.failed.any()


@several
@given(power=st.integers(-4, 4), seed=st.integers(0, 999))
def test_a_row_scaled_by_a_power_of_two_has_the_same_score(power: int, seed: int) -> None:
    vectors = rows_of(20, seed, np.float32)
    vectors = vectors[np.isfinite(vectors).all(axis=1) & (np.abs(vectors).max(axis=1) > 1e-3)]
    scaled = np.ldexp(vectors, power)
    scores, _, cosines = bits(vectors)
    again, _, cosines_again = bits(scaled)
    assert np.array_equal(scores, again)
    assert np.array_equal(cosines, cosines_again)


# Rows without a direction, and rows beyond float32's range.

ODD_ROWS: dict[str, tuple[Any, Any]] = {
    "NaN": (np.float16, lambda x: np.where(np.arange(WIDTH) == 77, np.nan, x)),
    "all NaN": (np.float32, lambda x: x * np.nan),
    "infinity": (np.float16, lambda x: np.where(np.arange(WIDTH) == 0, np.inf, x)),
    "minus infinity": (np.float32, lambda x: np.where(np.arange(WIDTH) == 767, -np.inf, x)),
    "both infinities": (np.float64, lambda x: np.where(x > 0, np.inf, -np.inf)),
    "zeros": (np.float16, lambda x: x * 0),
    "minus zeros": (np.float32, lambda x: -np.abs(x * 0)),
}


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", ODD_ROWS)
def test_a_row_without_a_direction_fails_alone(name: str, which: str) -> None:
    dtype, spoil = ODD_ROWS[name]
    vectors = np.random.default_rng(10).standard_normal((600, WIDTH)).astype(dtype)
    expected = bits(vectors, which)
    broken = vectors.copy()
    spoiled = [0, 255, 256, 599]
    for row in spoiled:
        broken[row] = spoil(broken[row])
    with forced(which):
        found = kernels.measure(broken, WEIGHT, BIAS, REFERENCE)
    assert np.flatnonzero(found.failed).tolist() == spoiled
    good = ~found.failed
    assert np.array_equal(found.scores[good].view(np.uint32), expected[0, good])
    assert np.array_equal(found.norms[good].view(np.uint32), expected[1, good])
    assert np.isnan(found.scores[spoiled]).all()
    assert np.isnan(found.cosines[spoiled]).all()
    reason = "embedding is all zeros" if "zeros" in name else "embedding holds NaN or infinity"
    assert [found.error(row) for row in (*spoiled, 1)] == [*[reason] * 4, None]
    wanted_norm = 0.0 if "zeros" in name else np.nan
    np.testing.assert_array_equal(found.norms[spoiled], wanted_norm)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (np.float16, 6e4),
        (np.float16, 6e-8),  # one unit of the smallest subnormal
        (np.float32, 1e30),
        (np.float32, 3e38),
        (np.float32, 1e-30),
        (np.float32, 1e-44),  # a few units of the smallest subnormal
        (np.float64, 1e200),
        (np.float64, 1e308),
        (np.float64, 1e-200),
        (np.float64, 5e-324),
    ],
)
def test_huge_and_tiny_rows_have_a_direction(dtype: Any, size: float, which: str) -> None:
    signs = np.random.default_rng(12).choice([-1.0, 0.0, 1.0], (9, WIDTH))
    vectors = (signs * size).astype(dtype)
    vectors[4] = np.random.default_rng(13).standard_normal(WIDTH).astype(dtype)  # between them
    with forced(which):
        found = kernels.measure(vectors, WEIGHT, BIAS, REFERENCE)
    signs[4] = vectors[4]
    scores, norms, cosines = exact(signs)
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.cosines, cosines, rtol=0, atol=1e-6)
    assert not found.failed.any()
    assert [found.error(row) for row in range(9)] == [None] * 9
    step = float(np.abs(vectors[0]).max())
    with np.errstate(over="ignore", under="ignore"):
        true_norms = (np.where(np.arange(9) == 4, 1.0, step) * norms).astype(np.float32)
    np.testing.assert_allclose(found.norms, true_norms, rtol=1e-6)


def test_no_rows_at_all() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        found = kernels.measure(np.empty((0, WIDTH), dtype), WEIGHT, BIAS, REFERENCE)
        assert found.scores.shape == found.norms.shape == found.cosines.shape == (0,)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.bool_, np.complex64, object])
def test_values_that_are_not_floating_point_are_refused(dtype: Any) -> None:
    with pytest.raises(TypeError, match="must be float16, float32 or float64, not "):
        kernels.measure(np.zeros((2, WIDTH), dtype), WEIGHT, BIAS, REFERENCE)


@pytest.mark.parametrize("shape", [(WIDTH,), (2, WIDTH - 1), (2, WIDTH + 1), (1, 2, WIDTH), ()])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(N, 768\), not \("):
        kernels.measure(np.zeros(shape, np.float32), WEIGHT, BIAS, REFERENCE)


# A network with ReLUs between its layers.

NETWORK = tuple(
    (
        (_random.standard_normal((n_in, n_out)) / math.sqrt(n_in)).astype(np.float32),
        _random.standard_normal(n_out).astype(np.float32),
    )
    for n_in, n_out in ((WIDTH, 40), (40, 7), (7, 1))
)


def network(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """The same network in float64."""
    x = vectors.astype(np.float64)
    x = x / np.abs(x).max(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for weight, bias in NETWORK[:-1]:
        x = np.maximum(x @ weight.astype(np.float64) + bias, 0)
    return (x @ NETWORK[-1][0].astype(np.float64) + NETWORK[-1][1])[:, 0]


def layered(vectors: NDArray[Any], *, compiled: bool, threads: int = 1) -> NDArray[np.float32]:
    found = kernels_numba.layer_pass() if compiled else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILED_FROM_ROWS", 0 if compiled else 1 << 40)
        patch.setattr(kernels, "_compiled_layers", lambda: found)
        return kernels.layered_scores(vectors, NETWORK, threads=threads)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_layered_scores_are_right(dtype: Any) -> None:
    vectors = np.random.default_rng(14).standard_normal((300, WIDTH)).astype(dtype)
    np.testing.assert_allclose(layered(vectors, compiled=False), network(vectors), atol=1e-5)
    np.testing.assert_allclose(layered(vectors, compiled=True), network(vectors), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 200),
    cut=st.integers(0, 200),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    threads=st.integers(1, 4),
)
def test_layered_scores_are_the_rows_alone(
    seed: int, count: int, cut: int, dtype: Any, threads: int
) -> None:
    vectors = rows_of(count, seed, dtype)
    expected = layered(vectors, compiled=False).view(np.uint32)
    together = layered(vectors, compiled=True, threads=threads).view(np.uint32)
    assert np.array_equal(together, expected)
    cut = min(cut, count)
    parts = [layered(part, compiled=cut % 2 == 0) for part in (vectors[:cut], vectors[cut:])]
    assert np.array_equal(np.concatenate(parts).view(np.uint32), expected)
    if dtype == np.float16:
        wide = layered(vectors.astype(np.float32), compiled=False)
        assert np.array_equal(wide.view(np.uint32), expected)


@pytest.mark.parametrize("size", [1e-200, 1e-44, 1e-30, 1.0, 1e30, 3e38, 1e100, 1e200, 1e308])
def test_layered_scores_of_huge_and_tiny_rows(size: float) -> None:
    dtype = np.float32 if 1e-45 < size < 3.4e38 else np.float64
    signs = np.random.default_rng(15).choice([-1.0, 0.0, 1.0], (5, WIDTH))
    vectors = (signs * size).astype(dtype)
    for compiled in (False, True):
        np.testing.assert_allclose(layered(vectors, compiled=compiled), network(signs), atol=1e-5)


def test_layered_scores_of_rows_without_a_direction_are_nan() -> None:
    vectors = np.random.default_rng(16).standard_normal((70, WIDTH)).astype(np.float32)
    expected = layered(vectors, compiled=False)
    vectors[3], vectors[64, 5], vectors[69, 0] = 0, np.nan, np.inf
    for compiled in (False, True):
        found = layered(vectors, compiled=compiled)
        assert np.flatnonzero(np.isnan(found)).tolist() == [3, 64, 69]
        good = ~np.isnan(found)
        assert np.array_equal(found[good], expected[good])
