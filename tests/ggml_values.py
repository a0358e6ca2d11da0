"""Weights of many kinds for the tests of quantizers: what models hold, and what breaks formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen35.array_types import F32, Array
from qwen35.codecs.floats import bf16_from_f32, f32_from

__all__ = ["DISTRIBUTIONS", "IMPORTANCE", "weights"]

Generator = np.random.Generator
Shape = tuple[int, int]


def _bf16(values: Array) -> F32:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    return f32_from(bf16_from_f32(flat), "BF16").reshape(values.shape)


def _sparse(generator: Generator, shape: Shape, share: float) -> Array:
    return generator.standard_normal(shape) * (generator.random(shape) < share)


def _outliers(generator: Generator, shape: Shape) -> Array:
    return generator.standard_normal(shape) * np.where(generator.random(shape) < 0.01, 100, 1)


def _zeros(generator: Generator, shape: Shape) -> Array:
    return np.where(generator.random(shape) < 0.5, np.float32(0), -np.float32(0))


def _constant_blocks(generator: Generator, shape: Shape) -> Array:
    return np.repeat(generator.standard_normal((shape[0], shape[1] // 32)), 32, axis=1)


def _exponents(generator: Generator, shape: Shape, low: int, high: int) -> Array:
    signs = generator.choice([-1.0, 1.0], shape)
    return signs * generator.random(shape) * 2.0 ** generator.integers(low, high, shape)


def _blocks_of_exponents(generator: Generator, shape: Shape) -> Array:
    """Each 16 of another size, so that scales of some round to 0."""
    sizes = 2.0 ** generator.integers(-40, 10, (shape[0], shape[1] // 16))
    return generator.standard_normal(shape) * np.repeat(sizes, 16, axis=1)


def _bits(generator: Generator, shape: Shape) -> Array:
    """Any finite float32."""
    words = generator.integers(0, 2**32, shape, np.uint32)
    words = np.where(words & 0x7F800000 == 0x7F800000, 0, words).astype(np.uint32)
    return words.view(np.float32)


def _scaled(scale: float) -> Callable[[Generator, Shape], Array]:
    return lambda generator, shape: _bf16(generator.standard_normal(shape) * scale)


DISTRIBUTIONS: dict[str, Callable[[Generator, Shape], Array]] = {
    "bf16": lambda g, s: _bf16(g.standard_normal(s) * 0.02),
    "f16": lambda g, s: (g.standard_normal(s) * 0.02).astype(np.float16),
    "f32": lambda g, s: g.standard_normal(s) * 0.02,
    "student-t": lambda g, s: _bf16(g.standard_t(3, s) * 0.02),
    "laplace": lambda g, s: _bf16(g.laplace(size=s) * 0.02),
    "uniform": lambda g, s: g.uniform(-1, 1, s),
    "zeros": lambda g, s: np.zeros(s),
    "zeros of both signs": _zeros,
    "minus zero": lambda g, s: np.full(s, -0.0),
    "ones": lambda g, s: np.ones(s),
    "minus ones": lambda g, s: -np.ones(s),
    "constant blocks": _constant_blocks,
    "1e-8": _scaled(1e-8),
    "1e-15": _scaled(1e-15),
    "1e-20": _scaled(1e-20),
    "1e4": _scaled(1e4),
    "1e5": _scaled(1e5),
    "6e37": _scaled(6e37),
    "positive": lambda g, s: np.abs(g.standard_normal(s)),
    "negative": lambda g, s: -np.abs(g.standard_normal(s)),
    "offset": lambda g, s: g.standard_normal(s) * 0.01 + 1,
    "negative offset": lambda g, s: g.standard_normal(s) * 0.01 - 1,
    "far offset": lambda g, s: _bf16(g.standard_normal(s) * 0.01 + 100),
    "sparse": lambda g, s: _sparse(g, s, 0.1),
    "one in a block": lambda g, s: _sparse(g, s, 1 / 256),
    "ties": lambda g, s: g.integers(-8, 8, s) / 16,
    "halves": lambda g, s: g.integers(-31, 32, s) / 2,
    "outliers": _outliers,
    "two values": lambda g, s: g.choice([-1.0, 0.5], s),
    "subnormal": lambda g, s: g.standard_normal(s) * 1e-41,
    "nearly subnormal": lambda g, s: g.standard_normal(s) * 1e-37,
    "mixed exponents": lambda g, s: _exponents(g, s, -149, 100),
    "ordinary exponents": lambda g, s: _exponents(g, s, -30, 5),
    "blocks of exponents": _blocks_of_exponents,
    "any bits": _bits,
}
"""Name to what draws an array of a shape."""

IMPORTANCE: dict[str, Callable[[Generator, int], Array] | None] = {
    "none": None,
    "exponential": lambda g, row: g.exponential(size=row),
    "with zeros": lambda g, row: _with_zeros(g, row),
    "mixed": lambda g, row: 10.0 ** g.uniform(-12, 6, row),
}
"""Name to what draws the importance of a row's columns."""


def _with_zeros(generator: Generator, row: int) -> Array:
    """Three in ten are zero, and all of the second super-block."""
    values = generator.exponential(size=row) * (generator.random(row) < 0.7)
    values[256:512] = 0
    return values


def weights(name: str, shape: Shape, seed: int = 0) -> F32:
    """Return weights of a distribution, float32."""
    with np.errstate(under="ignore"):
        drawn = DISTRIBUTIONS[name](np.random.default_rng(seed), shape)
        return np.ascontiguousarray(drawn, np.float32)
