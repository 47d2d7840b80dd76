"""Triton kernels: programs over tables of tiles, see `fingerprint_tiles` for the columns.

A program takes one row. It adds up whole steps of UNROLL * BLOCK positions, whose loads are vectors without a mask, and
then the steps at the ends of its tile, element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resume_kit.algebra import fingerprint

_STEP = tl.constexpr(fingerprint.STEP)
_MASK = tl.constexpr(fingerprint.MASK)
_MIX_LOW = tl.constexpr(fingerprint.MIX & 0xFFFFFFFF)
_MIX_HIGH = tl.constexpr(fingerprint.MIX >> 32)

_EDGE = tl.constexpr(512)  # positions of a step without vectors; more would take registers from the whole steps


@triton.jit
def _add(bits, z, total, upper):
    """Add bits * w to total + 2**32 * upper, for z = (i + 1) * STEP, in halves of 32 bits."""
    hi = (z >> 32).to(tl.uint32)
    lo = z.to(tl.uint32) ^ hi
    z = lo.to(tl.uint64) * _MIX_LOW
    hi = (z >> 32).to(tl.uint32) + lo * _MIX_HIGH + hi * _MIX_LOW
    lo = (z.to(tl.uint32) ^ hi) | 1
    if bits.dtype == tl.uint64:
        upper += (bits >> 32).to(tl.uint32) * lo
    bits = bits.to(tl.uint32)
    return total + bits.to(tl.uint64) * lo.to(tl.uint64), upper + bits * hi


@triton.jit
def _of_grid(ahead, gap, magic):
    """What z gains `ahead` elements after the start of a run, gaps between runs and all."""
    ahead = ahead.to(tl.uint32)
    runs = tl.umulhi(ahead * 2 + 1, magic)  # ahead // length
    return ahead.to(tl.uint64) * _STEP + runs.to(tl.uint64) * gap


@triton.jit
def sum_tiles(table, out, SIZE: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Add the weighted sum of each row's elements, of SIZE bytes, to out[row of the result]. GRID: short runs.

    A thread takes vectors, so that it has one z for each and reaches the vector's elements by constants.
    """
    row = table + tl.program_id(0) * (8 if GRID else 5)
    address = tl.load(row) * 16
    if SIZE == 1:
        data = address.to(tl.pointer_type(tl.uint8))
    elif SIZE == 2:
        data = address.to(tl.pointer_type(tl.uint16))
    elif SIZE == 4:
        data = address.to(tl.pointer_type(tl.uint32))
    else:
        data = address.to(tl.pointer_type(tl.uint64))
    data = tl.multiple_of(data, 16)
    z = tl.load(row + 1).to(tl.uint64, bitcast=True)
    lo = tl.load(row + 2).to(tl.int32)
    hi = tl.load(row + 3).to(tl.int32)
    if GRID:
        before = tl.load(row + 5).to(tl.int32)
        gap = tl.load(row + 6).to(tl.uint64, bitcast=True)
        magic = tl.load(row + 7).to(tl.uint32)
    whole: tl.constexpr = UNROLL * BLOCK
    begin = tl.where(lo > 0, whole, 0)  # from begin to end: whole steps
    end = tl.maximum(hi // whole * whole, begin)

    length: tl.constexpr = min(8, 16 // SIZE)  # of a vector
    vector = tl.arange(0, BLOCK // length) * length
    within = tl.arange(0, length)
    lane = vector[:, None] + within[None, :]
    here = z + begin.to(tl.uint64) * _STEP + vector.to(tl.uint64) * _STEP
    total = tl.zeros((BLOCK // length, length), tl.uint64)
    upper = tl.zeros((BLOCK // length, length), tl.uint32)
    for start in range(begin, end, whole):
        for part in tl.static_range(UNROLL):
            at = start + part * BLOCK + lane
            bits = tl.load(data + at)
            if GRID:
                total, upper = _add(bits, z + _of_grid(at + before, gap, magic), total, upper)
            else:
                total, upper = _add(bits, here[:, None] + within[None, :].to(tl.uint64) * _STEP, total, upper)
                here += BLOCK * _STEP & _MASK
    result = tl.sum(total + (upper.to(tl.uint64) << 32))

    total = tl.zeros((_EDGE,), tl.uint64)
    upper = tl.zeros((_EDGE,), tl.uint32)
    head = begin // _EDGE
    for step in range(0, head + tl.cdiv(tl.maximum(hi - end, 0), _EDGE)):
        at = tl.where(step < head, step * _EDGE, end + (step - head) * _EDGE) + tl.arange(0, _EDGE)
        bits = tl.load(data + at, mask=(at >= lo) & (at < hi), other=0)
        if GRID:
            total, upper = _add(bits, z + _of_grid(at + before, gap, magic), total, upper)
        else:
            total, upper = _add(bits, z + at.to(tl.uint64) * _STEP, total, upper)
    result += tl.sum(total + (upper.to(tl.uint64) << 32), 0)
    tl.atomic_add(out + tl.load(row + 4), result.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def count_miscasts(table, out, ALIGNED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Add to out[row of the result] how many elements are not the cast of their fp32 master, bit for bit.

    Columns: address of the elements, of the masters, number of elements, row of the result. ALIGNED: both addresses
    are multiples of 16, and given divided by it. HALF: fp16, else bf16.
    """
    row = table + tl.program_id(0) * 4
    scale = 16 if ALIGNED else 1
    data = (tl.load(row) * scale).to(tl.pointer_type(tl.float16 if HALF else tl.bfloat16))
    master = (tl.load(row + 1) * scale).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        data = tl.multiple_of(data, 16)
        master = tl.multiple_of(master, 16)
    size = tl.load(row + 2).to(tl.int32)
    whole = size // BLOCK * BLOCK
    lane = tl.arange(0, BLOCK)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, whole, BLOCK):
        kept = tl.load(data + start + lane)
        cast = tl.load(master + start + lane).to(kept.dtype)
        wrong += (kept.to(tl.int16, bitcast=True) != cast.to(tl.int16, bitcast=True)).to(tl.int32)
    if whole < size:
        at = whole + lane
        kept = tl.load(data + at, mask=at < size, other=0.0)
        cast = tl.load(master + at, mask=at < size, other=0.0).to(kept.dtype)
        wrong += (kept.to(tl.int16, bitcast=True) != cast.to(tl.int16, bitcast=True)).to(tl.int32)
    tl.atomic_add(out + tl.load(row + 3), tl.sum(wrong, 0).to(tl.int64), sem="relaxed")
