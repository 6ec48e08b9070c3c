"""What the kernels share: a tile of vectors out of memory, as they are or quantized."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(
    base,
    start,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CUT: tl.constexpr,
):
    """BLOCK vectors of a matrix from ``start`` on; 0 from ``end`` on, if it may CUT the tile."""
    row, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    at = base + tl.cast(start, tl.int64) * stride + row[:, None] * stride + dim[None, :]
    if CUT and HEAD_DIM != DIM_BLOCK:
        return tl.load(at, mask=(start + row < end)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif CUT:
        return tl.load(at, mask=(start + row < end)[:, None], other=0.0)
    elif HEAD_DIM != DIM_BLOCK:
        return tl.load(at, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def slot_tile(
    elements,
    scales,
    start,
    end,
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK vectors of a head's slots from ``start`` on: precision.dequantize in a kernel."""
    if KIND == "auto":
        return tile(elements, start, end, HEAD_DIM, HEAD_DIM, DIM_BLOCK, BLOCK, True)
    else:
        row: tl.constexpr = HEAD_DIM // 2 if KIND == "int4" else HEAD_DIM
        slot, dim = start + tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
        there = (slot < end)[:, None] & (dim < HEAD_DIM)[None, :]
        raw = tl.load(elements + slot[:, None] * row + (dim % row)[None, :], mask=there, other=0)
        if KIND == "float8":
            # E4M3's exponent is 120 less than that of float32 with the same bits.
            bits = raw.to(tl.uint32)
            bits = ((bits & 128) << 24) | ((bits & 127) << 20)
            value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        elif KIND == "int4":
            half = raw.to(tl.int32) >> (dim // row * 4)[None, :]
            value = ((half & 15) - 8).to(tl.float32)
        else:
            value = raw.to(tl.float32)
        if GROUPS == 1:
            scale = tl.load(scales + slot, mask=slot < end, other=0.0)[:, None]
        else:
            group = dim // (HEAD_DIM // GROUPS)
            scale = tl.load(scales + slot[:, None] * GROUPS + group[None, :], mask=there, other=0.0)
        return (value * scale.to(tl.float32)).to(dtype)
