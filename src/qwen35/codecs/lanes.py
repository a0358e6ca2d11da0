"""Vectors of 16 numbers for Numba kernels, so that 16 blocks are computed side by side.

A kernel written with them reads like the formula for one block: ``scale * level + low - x``. Each
lane is computed as C computes a scalar: every operation rounds to float32 by itself, nothing is
fused or reordered, so that results depend on no processor. LLVM splits a vector into as many
registers as the processor needs.

There are three kinds: `FLOATS` (float32), `INTS` (int32) and `MASK` (what comparisons give). The
other operand of an operator may be a number; it then stands for 16 of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qwen35.codecs.compiled import compiled  # first: it imports Numba in its own way

# isort: split
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

__all__ = [
    "FLOATS",
    "INTS",
    "LANES",
    "MASK",
    "bits",
    "floats",
    "from_bits",
    "gather",
    "ints",
    "largest",
    "load",
    "magnitude",
    "packed",
    "root",
    "select",
    "some",
    "splat",
    "store",
    "store_bytes",
    "transpose",
]

LANES = 16
"""Numbers of a vector: one AVX-512 register, two of AVX2, four of SSE2 or NEON."""


class Lanes(types.Type):
    """A Numba type: a vector of 16.

    Args:
        kind: its name in messages.
        element: what it holds.
        llvm: the same for LLVM.
    """

    def __init__(self, kind: str, element: Any, llvm: Any) -> None:
        self.element, self.vector = element, ir.VectorType(llvm, LANES)
        super().__init__(f"lanes.{kind}")


FLOATS = Lanes("floats", types.float32, ir.FloatType())
INTS = Lanes("ints", types.int32, ir.IntType(32))
MASK = Lanes("mask", types.boolean, ir.IntType(1))
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, lanes.vector)


def _filled(builder: Any, number: Any, lanes: Lanes) -> Any:
    """Return a vector of one number."""
    nothing = ir.Constant(lanes.vector, ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
    first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, nothing, first)


def _operand(context: Any, builder: Any, value: Any, given: Any, lanes: Lanes) -> Any:
    """Return an operand as a vector, a number as a vector of it."""
    if given == lanes:
        return value
    number = context.cast(builder, value, types.unliteral(given), lanes.element)
    return _filled(builder, number, lanes)


# --- operators


def _define(symbol: Any, lanes: Lanes, result: Lanes, make: Callable[..., Any]) -> None:
    """Give an operator its meaning for two vectors of a kind, or for one and a number."""

    @type_callable(symbol)
    def _typing(context: Any) -> Any:
        del context

        def typer(a: Any, b: Any) -> Any:
            if lanes not in (a, b):
                return None
            other = b if a == lanes else a
            return result if other == lanes or isinstance(other, types.Number) else None

        return typer

    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pairs = zip(values, signature.args, strict=True)
        return make(builder, *(_operand(context, builder, *pair, lanes) for pair in pairs))

    for kinds in ((lanes, lanes), (lanes, types.Number), (types.Number, lanes)):
        lower_builtin(symbol, *kinds)(lower)


_define(operator.add, FLOATS, FLOATS, lambda builder, a, b: builder.fadd(a, b))
_define(operator.sub, FLOATS, FLOATS, lambda builder, a, b: builder.fsub(a, b))
_define(operator.mul, FLOATS, FLOATS, lambda builder, a, b: builder.fmul(a, b))
_define(operator.truediv, FLOATS, FLOATS, lambda builder, a, b: builder.fdiv(a, b))
_define(operator.lt, FLOATS, MASK, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_define(operator.le, FLOATS, MASK, lambda builder, a, b: builder.fcmp_ordered("<=", a, b))
_define(operator.gt, FLOATS, MASK, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_define(operator.ne, FLOATS, MASK, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))

_define(operator.add, INTS, INTS, lambda builder, a, b: builder.add(a, b))
_define(operator.sub, INTS, INTS, lambda builder, a, b: builder.sub(a, b))
_define(operator.and_, INTS, INTS, lambda builder, a, b: builder.and_(a, b))
_define(operator.or_, INTS, INTS, lambda builder, a, b: builder.or_(a, b))
_define(operator.lshift, INTS, INTS, lambda builder, a, b: builder.shl(a, b))
_define(operator.rshift, INTS, INTS, lambda builder, a, b: builder.lshr(a, b))
_define(operator.lt, INTS, MASK, lambda builder, a, b: builder.icmp_signed("<", a, b))
_define(operator.gt, INTS, MASK, lambda builder, a, b: builder.icmp_signed(">", a, b))
_define(operator.ne, INTS, MASK, lambda builder, a, b: builder.icmp_signed("!=", a, b))

_define(operator.and_, MASK, MASK, lambda builder, a, b: builder.and_(a, b))
_define(operator.or_, MASK, MASK, lambda builder, a, b: builder.or_(a, b))


# --- memory


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any, vector: Any) -> Any:
    """Return a pointer to a vector: a row of a tile, or 16 neighbours from an element on."""
    data = context.make_array(kind)(context, builder, array).data
    if kind.ndim > 1:
        index = builder.mul(index, ir.Constant(index.type, LANES))
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _loaded(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Return a vector from memory; bits of bfloat16 are widened to float32."""
    halves = kind.dtype == types.uint16
    vector = _HALVES if halves else (FLOATS if kind.dtype == types.float32 else INTS).vector
    place = _place(context, builder, kind, array, index, vector)
    found = builder.load(place, align=2 if halves else 4)
    if not halves:
        return found
    up = _filled(builder, ir.Constant(ir.IntType(32), 16), INTS)
    return builder.bitcast(builder.shl(builder.zext(found, INTS.vector), up), FLOATS.vector)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """Load row `index` of a tile [n, 16], or 16 elements of a flat array from `index` on.

    Elements of uint16 are bits of bfloat16, and become `FLOATS`.
    """
    del typing, index
    lanes = FLOATS if array.dtype in (types.float32, types.uint16) else INTS

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _loaded(context, builder, signature.args[0], *values)

    return lanes(array, types.intp), codegen


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store a vector where `load` would find it."""
    del typing, index

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data, row, vector = values
        place = _place(context, builder, signature.args[0], data, row, value.vector)
        builder.store(vector, place, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def store_bytes(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store the low byte of each integer in a flat array of bytes, from `index` on."""
    del typing, index

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data, row, vector = values
        place = _place(context, builder, signature.args[0], data, row, _BYTES)
        builder.store(builder.trunc(vector, _BYTES), place, align=1)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of 16 vectors: squares of 1, 2, 4 and 8 lanes are exchanged in turn."""
    for width in (1, 2, 4, 8):
        upper = [j if not j & width else LANES + j - width for j in range(LANES)]
        lower = [j + width if not j & width else LANES + j for j in range(LANES)]
        for i in (i for i in range(LANES) if not i & width):
            a, b = rows[i], rows[i + width]
            masks = (ir.Constant(INTS.vector, order) for order in (upper, lower))
            rows[i], rows[i + width] = (builder.shuffle_vector(a, b, mask) for mask in masks)
    return rows


@intrinsic
def transpose(typing: Any, flat: Any, start: Any, size: Any, tile: Any, row: Any) -> Any:
    """Put 16 elements of 16 blocks into rows of a tile, so that each block has a lane.

    flat: float32, or bits of bfloat16; start: where in the first block to begin; size: of the
    blocks; tile: [n, 16] float32; row: the first of its rows to fill.
    """
    del typing, start, size, row

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data, place, step, into, top = values
        blocks = []
        for _ in range(LANES):
            blocks.append(_loaded(context, builder, signature.args[0], data, place))
            place = builder.add(place, step)
        for i, vector in enumerate(_transposed(builder, blocks)):
            at = builder.add(top, ir.Constant(top.type, i))
            place = _place(context, builder, signature.args[3], into, at, FLOATS.vector)
            builder.store(vector, place, align=4)
        return context.get_dummy_value()

    return types.none(flat, types.intp, types.intp, tile, types.intp), codegen


# --- functions


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """Return 16 times a number: a float as `FLOATS`, an integer as `INTS`."""
    del typing
    lanes = FLOATS if isinstance(number, types.Float) else INTS

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        del context, signature
        return _filled(builder, values[0], lanes)

    return lanes(lanes.element), codegen


@intrinsic
def select(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """Return `a` in the lanes of the mask, `b` in the others; one of them may be a number."""
    del typing
    lanes = a if isinstance(a, Lanes) else b

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pairs = zip(values[1:], signature.args[1:], strict=True)
        sides = (_operand(context, builder, *pair, lanes) for pair in pairs)
        return builder.select(values[0], *sides)

    return lanes(mask, a, b), codegen


def _function(given: Lanes, result: Any, make: Callable[..., Any]) -> Any:
    """Return a function of one vector."""

    @intrinsic
    def function(typing: Any, value: Any) -> Any:
        del typing

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            del context, signature
            return make(builder, *values)

        return (result(value), codegen) if value == given else None

    return function


def _called(name: str, given: Lanes, result: Any) -> Callable[..., Any]:
    """Return what calls a function of LLVM."""

    def make(builder: Any, value: Any) -> Any:
        kind = ir.FunctionType(result, [given.vector])
        called = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}")
        return builder.call(called, [value])

    return make


def _packed(builder: Any, mask: Any) -> Any:
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), ir.IntType(32))


def _some(builder: Any, mask: Any) -> Any:
    return builder.icmp_unsigned("!=", _packed(builder, mask), ir.Constant(ir.IntType(32), 0))


bits = _function(FLOATS, INTS, lambda builder, value: builder.bitcast(value, INTS.vector))
"""The bits of floats."""

from_bits = _function(INTS, FLOATS, lambda builder, value: builder.bitcast(value, FLOATS.vector))
"""The floats of bits."""

floats = _function(INTS, FLOATS, lambda builder, value: builder.sitofp(value, FLOATS.vector))
"""Integers as floats, rounded to nearest."""

ints = _function(FLOATS, INTS, lambda builder, value: builder.fptosi(value, INTS.vector))
"""Floats without their fraction; they must be within int32."""

magnitude = _function(FLOATS, FLOATS, _called("fabs.v16f32", FLOATS, FLOATS.vector))
"""Absolute values."""

root = _function(FLOATS, FLOATS, _called("sqrt.v16f32", FLOATS, FLOATS.vector))
"""Square roots, rounded to nearest."""

largest = _function(INTS, types.int32, _called("vector.reduce.smax.v16i32", INTS, ir.IntType(32)))
"""The largest of 16 integers."""

packed = _function(MASK, types.int32, _packed)
"""A mask as an integer, the first lane in its lowest bit."""

some = _function(MASK, types.boolean, _some)
"""Whether any lane of a mask is set."""


# --- blocks side by side


@compiled
def gather(flat: Any, first: Any, count: Any, period: Any, tile: Any) -> Any:
    """Put 16 blocks into the columns of a tile.

    Args:
        flat: blocks, one after the other, float32.
        first: number of the first block.
        count: how many there are; where fewer than 16 are left, the last takes the other columns.
        period: blocks after which `flat` begins again (importance does, for every row).
        tile: [elements of a block, 16] float32.
    """
    size = tile.shape[0]
    for k in range(LANES):
        start = min(first + k, count - 1) % period * size
        block = flat[start : start + size]
        for i in range(size):
            tile[i, k] = block[i]
