"""Kernels that move many weights in one launch: as they are, or to other strides. Need Triton.

To change strides, each weight is moved in tiles. A tile is read along the digits that are fast in
the value, and written along those that are fast in the engine, so that both are adjacent words.
Digits are those of ``moves``.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _offsets(number: tl.tensor, at: tl.tensor, DIGITS: tl.constexpr):  # noqa: ANN202, N803
    """Offsets in the value and in the engine of some numbers of one side.

    Integers cannot be divided fast, so they are multiplied instead: Granlund and Montgomery,
    "Division by Invariant Integers using Multiplication", PLDI 1994, figure 4.1.
    """
    source, target = number * 0, number * 0
    for digit in tl.static_range(DIGITS):
        one = at + 5 * digit
        if digit + 1 < DIGITS:
            magic, shift = tl.load(one + 3).to(tl.uint32), tl.load(one + 4).to(tl.uint32)
            unsigned = number.to(tl.uint32)
            rest = ((tl.umulhi(unsigned, magic) + unsigned) >> shift).to(tl.int32)
            index = number - rest * tl.load(one)
            number = rest
        else:
            index = number
        source += index * tl.load(one + 1)
        target += index * tl.load(one + 2)
    return source, target


@triton.jit
def turn(  # noqa: ANN201, PLR0913, PLR0917 - Triton reads no annotation here; all is given by name
    target: tl.tensor,
    sources: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    COLUMNS: tl.constexpr,  # noqa: N803 - Triton's way to write constants
    TILE: tl.constexpr,  # noqa: N803
    READ: tl.constexpr,  # noqa: N803
    WRITTEN: tl.constexpr,  # noqa: N803
    READ_DENSE: tl.constexpr,  # noqa: N803
    WRITTEN_DENSE: tl.constexpr,  # noqa: N803
):
    """Move one tile of one weight.

    Args:
        target: The engine's memory as words.
        sources: Address of each value.
        starts: First word of each weight in that memory.
        rows: ``COLUMNS`` integers for each weight: sizes of both sides, whether tiles are written
            as they are read, where the second side begins; then for each digit of each side its
            count, its strides in the value and in the engine, and what divides by its count.
        tiles: Number of the weight and number of the tile in it, for each program.
        COLUMNS: Length of a row.
        TILE: Length of each side of a tile.
        READ: Most digits along which is read.
        WRITTEN: Most digits along which is written.
        READ_DENSE: Whether a tile is read along adjacent words. Triton has to see that.
        WRITTEN_DENSE: Whether it is written along adjacent words.
    """
    program = tl.program_id(0)
    weight = tl.load(tiles + 2 * program)
    tile = tl.load(tiles + 2 * program + 1)
    row = rows + weight * COLUMNS
    read, written = tl.load(row), tl.load(row + 1)
    as_read, second = tl.load(row + 2), tl.load(row + 3)
    across = tl.cdiv(read, TILE)
    y = (tile % across) * TILE + tl.arange(0, TILE)
    x = (tile // across) * TILE + tl.arange(0, TILE)
    y_source, y_target = _offsets(y, row + 4, READ)
    x_source, x_target = _offsets(x, row + second, WRITTEN)
    if READ_DENSE:
        y_source = y
    if WRITTEN_DENSE:
        x_target = x
    y_inside, x_inside = y < read, x < written
    source = tl.load(sources + weight).to(target.dtype)
    start = target + tl.load(starts + weight)
    inside = x_inside[:, None] & y_inside[None, :]
    value = tl.load(source + x_source[:, None] + y_source[None, :], mask=inside)
    if as_read == 1:
        tl.store(start + x_target[:, None] + y_target[None, :], value, mask=inside)
    else:
        turned = y_inside[:, None] & x_inside[None, :]
        tl.store(start + y_target[:, None] + x_target[None, :], tl.trans(value), mask=turned)


@triton.jit
def copy(  # noqa: ANN201 - as above
    target: tl.tensor,
    sources: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Copy some adjacent words of one weight.

    Args:
        target: The engine's memory as words.
        sources: Address of each value.
        starts: First word of each weight in that memory.
        rows: Number of words of each weight.
        tiles: Number of the weight and number of the block in it, for each program.
        BLOCK: Words of a block.
    """
    program = tl.program_id(0)
    weight = tl.load(tiles + 2 * program)
    at = tl.load(tiles + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(rows + weight)
    source = tl.load(sources + weight).to(target.dtype)
    start = target + tl.load(starts + weight)
    tl.store(start + at, tl.load(source + at, mask=inside), mask=inside)


@triton.jit
def screen(  # noqa: ANN201 - as above
    found: tl.tensor,
    words: tl.tensor,
    sources: tl.tensor,
    counts: tl.tensor,
    masks: tl.tensor,
    tiles: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Look for NaN and infinity in some adjacent words of one value.

    Args:
        found: Becomes 1 if there is any.
        words: A pointer to integers as large as the words.
        sources: Address of each value.
        counts: Number of words of each value.
        masks: For each value, the bits that are all set in NaN and infinity.
        tiles: Number of the value and number of the block in it, for each program.
        BLOCK: Words of a block.
    """
    program = tl.program_id(0)
    value = tl.load(tiles + 2 * program)
    at = tl.load(tiles + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + value).to(words.dtype)
    mask = tl.load(masks + value)
    word = tl.load(source + at, mask=at < tl.load(counts + value), other=0)
    bad = tl.max(((word & mask) == mask).to(tl.int32), 0)
    tl.store(found, bad, mask=bad > 0)


@triton.jit
def differ(  # noqa: ANN201 - as above
    other: tl.tensor,
    words: tl.tensor,
    end: tl.tensor,
    found: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Compare some adjacent words with others.

    Args:
        other: The others.
        words: The words.
        end: How many there are.
        found: Becomes 1 if any differ.
        BLOCK: Words that a program compares.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(end)
    mine = tl.load(words + at, mask=inside, other=0)
    bad = tl.max((mine != tl.load(other + at, mask=inside, other=0)).to(tl.int32), 0)
    tl.store(found, bad, mask=bad > 0)


@triton.jit
def fold(  # noqa: ANN201 - as above
    target: tl.tensor,
    values: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Compute scales and shifts of some channels of folded norms; see ``folds.Fold``.

    Args:
        target: The engine's memory as words of the norms' dtype: float32 or smaller.
        values: All weights of norms of that dtype.
        rows: For each program, where to read weights, biases, means, variances and eps, and where
            to write scales and shifts, in rows of ``BLOCK``.
        BLOCK: Channels of a program.
    """
    at = rows + tl.program_id(0).to(tl.int64) * 7 * BLOCK + tl.arange(0, BLOCK)
    kind = target.dtype.element_ty
    weight = tl.load(values + tl.load(at)).to(tl.float64)
    bias = tl.load(values + tl.load(at + BLOCK)).to(tl.float64)
    mean = tl.load(values + tl.load(at + 2 * BLOCK)).to(tl.float64)
    var = tl.load(values + tl.load(at + 3 * BLOCK)).to(tl.float32)
    eps = tl.load(values + tl.load(at + 4 * BLOCK)).to(tl.float32)
    # each step is rounded to the norm's dtype, by way of float32 as torch does it. A quotient of
    # float32 that was computed in float64 is rounded to the nearest number, too
    spread = (var + eps).to(kind).to(tl.float64)
    root = tl.sqrt(spread).to(tl.float32).to(kind).to(tl.float64)
    scale = (weight / root).to(tl.float32).to(kind)
    shift = (bias - mean * scale.to(tl.float64)).to(tl.float32).to(kind)
    tl.store(target + tl.load(at + 5 * BLOCK), scale)
    tl.store(target + tl.load(at + 6 * BLOCK), shift)
