"""x @ W.T for the few rows of a decode step, and what follows it.

Such a product takes as long as its weights take to be read. What can be done on the way is done
in the same launch, since with every launch the device falls idle for a while: several matrices
that one input is multiplied with, an activation, its product with that of another matrix
(gated units such as SwiGLU), and a sum with the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from keyformer.kernels.decode import processors
from keyformer.kernels.early import early, let_next_start, wait

MOST_ROWS = 32
"""Of an input: with more, matrix products are no longer a matter of reading weights alone."""

MOST_MATRICES = 3
"""Of one launch."""


@triton.jit
def _product(
    x,
    residual,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    output_0,
    output_1,
    output_2,
    columns_0,
    columns_1,
    columns_2,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    SEVERAL: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BLOCK columns of a product, of all rows of ``x``.

    The grid is the blocks of all matrices, or where it is GATED of the first. All is dense.

    ================ ======================= ========================
    array            shape                   dtype
    ================ ======================= ========================
    x                (rows, width)           model's
    residual         (rows, columns_0)       model's, or None
    weight_i         (columns_i, width)      model's
    bias_i           (columns_i,)            model's, or None
    output_i         (rows, columns_i)       model's
    ================ ======================= ========================
    """
    program = tl.program_id(0)
    weight, bias, output, columns = weight_0, bias_0, output_0, columns_0
    if SEVERAL:
        first = tl.cdiv(columns_0, BLOCK)
        second = first + tl.cdiv(columns_1, BLOCK)
        of_1, of_2 = program >= first, program >= second
        weight = tl.where(of_2, weight_2, tl.where(of_1, weight_1, weight_0))
        output = tl.where(of_2, output_2, tl.where(of_1, output_1, output_0))
        columns = tl.where(of_2, columns_2, tl.where(of_1, columns_1, columns_0))
        if BIASED:
            bias = tl.where(of_2, bias_2, tl.where(of_1, bias_1, bias_0))
        program -= tl.where(of_2, second, tl.where(of_1, first, 0))
    column = program * BLOCK + tl.arange(0, BLOCK)
    # Beyond the last column it is read once more.
    of_column = tl.minimum(column, columns - 1).to(tl.int64)[:, None] * width
    row, element = tl.arange(0, ROWS), tl.arange(0, WIDTH_BLOCK)
    there = (row < rows)[:, None]
    # One row is multiplied element by element, several by tensor cores.
    wide: tl.constexpr = WIDTH_BLOCK if ROWS == 1 else ROWS
    total = tl.zeros([BLOCK, wide], tl.float32)
    gated = tl.zeros([BLOCK, wide], tl.float32)
    wait(EARLY)
    for start in tl.range(0, width, WIDTH_BLOCK, num_stages=STAGES):
        at = start + element
        inside = at < width
        if WHOLE:
            w = tl.load(weight + of_column + at[None, :])
            part = tl.load(x + row[:, None] * width + at[None, :], mask=there, other=0.0)
        else:
            w = tl.load(weight + of_column + at[None, :], mask=inside[None, :], other=0.0)
            in_row = there & inside[None, :]
            part = tl.load(x + row[:, None] * width + at[None, :], mask=in_row, other=0.0)
        total = _multiplied(total, w, part)
        if GATED:
            if WHOLE:
                w = tl.load(weight_1 + of_column + at[None, :])
            else:
                w = tl.load(weight_1 + of_column + at[None, :], mask=inside[None, :], other=0.0)
            gated = _multiplied(gated, w, part)
    let_next_start(EARLY)
    if ROWS == 1:
        total = tl.sum(total, axis=1)[:, None]
        gated = tl.sum(gated, axis=1)[:, None]
    known = column < columns
    if BIASED:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION == "silu":
        total *= tl.sigmoid(total)
    elif ACTIVATION == "gelu":
        total *= 0.5 * (1 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == "gelu by tanh":
        # tanh(y) = 2 sigmoid(2 y) - 1
        total *= tl.sigmoid(1.5957691216057308 * total * (1 + 0.044715 * total * total))
    if GATED:
        if BIASED:
            gated += tl.load(bias_1 + column, mask=known, other=0.0).to(tl.float32)[:, None]
        total *= gated
    at = row[None, :] * columns + column[:, None]
    mask = known[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + at, total, mask=mask)


@triton.jit
def _multiplied(total, w, x):
    """``total`` and the product of a tile of weights with one of the input."""
    if x.shape[0] == 1:
        return total + w.to(tl.float32) * x.to(tl.float32)
    else:
        return tl.dot(w, tl.trans(x), total, input_precision="tf32x3")


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    *,
    activation: str = "none",
    gated: bool = False,
    residual: Tensor | None = None,
) -> None:
    """Write into ``outputs`` what torch.nn.functional.linear gives, rounded once at the end.

    Parameters
    ----------
    x
        (..., width), of at most MOST_ROWS rows, contiguous, as all else.
    weights, biases
        Up to MOST_MATRICES of (columns, width), and for each (columns,) or None, in the dtype
        of ``x``.
    outputs
        (..., columns) for each matrix; one if they are ``gated``.
    activation
        Of what the first matrix gives: "none", "silu", "gelu" or "gelu by tanh".
    gated
        Multiply that with what the second matrix gives.
    residual
        Add this, (..., columns).
    """
    width = x.shape[-1]
    rows = x.numel() // width
    columns = [len(weight) for weight in weights]
    biased = any(bias is not None for bias in biases)
    if biased:
        biases = [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
    block, width_block, stages = tiling(rows, x, sum(columns), gated)
    blocks = sum(triton.cdiv(one, block) for one in columns[: len(outputs)])
    _product[(blocks,)](
        x,
        residual,
        *_filled_up(weights),
        *_filled_up(biases),
        *_filled_up(outputs),
        *[*columns, 0, 0][:MOST_MATRICES],
        rows,
        width,
        ROWS=1 if rows == 1 else max(16, triton.next_power_of_2(rows)),
        BLOCK=block,
        WIDTH_BLOCK=width_block,
        WHOLE=width % width_block == 0,
        SEVERAL=len(outputs) > 1,
        BIASED=biased,
        ACTIVATION=activation,
        GATED=gated,
        RESIDUAL=residual is not None,
        STAGES=stages,
        num_warps=4,
        **early(x.device),
    )


def _filled_up(some: Sequence[Any]) -> list[Any]:
    """With the first for each that is missing: it has no columns, so no program takes it."""
    return [*some, some[0], some[0]][:MOST_MATRICES]


def tiling(rows: int, x: Tensor, columns: int, gated: bool) -> tuple[int, int, int]:
    """Columns and width of a tile of weights, and how many tiles are on their way."""
    size = x.element_size()
    most = triton.next_power_of_2(x.shape[-1])
    if rows == 1:
        return 4, min(2048 // size, most), 3
    # A product of few columns comes out even if each processor has one block of them.
    narrow = columns <= 32 * processors(x.device)
    block = 32 if narrow or gated else 64
    return block, max(16, min(512 // size, most)), 6 if narrow and not gated else 4
