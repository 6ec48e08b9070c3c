"""Beams that change parents, in place: only what two rows do not have in common is copied.

Beams share most of their text. Two rows that were copies of one another some steps ago
differ in few slots since, so a beam that takes another's place costs its scores and
positions and those few keys and values, not its cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LARGEST_BATCH = 256
"""Rows whose vectors of one slot fit in a program's registers."""


@triton.jit
def _take(
    keys,
    values,
    positions,
    scores,
    parents,
    shared,
    batch,
    slots,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All rows of some slots of a head: everything is read before anything is written."""
    row, slot = tl.arange(0, BATCH_BLOCK), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    parent = tl.load(parents + row, mask=row < batch, other=0).to(tl.int32)
    moved = (row < batch) & (parent != row)
    here = (row * KV_HEADS + tl.program_id(1)).to(tl.int64)[:, None] * slots + slot[None, :]
    there = (parent * KV_HEADS + tl.program_id(1)).to(tl.int64)[:, None] * slots + slot[None, :]
    mask = moved[:, None] & (slot < slots)[None, :]
    position = tl.load(positions + there, mask=mask, other=-1)
    score = tl.load(scores + there, mask=mask, other=0.0)
    common = tl.load(shared + row * batch + parent, mask=moved, other=0)
    own_position = tl.load(positions + here, mask=mask, other=-1)
    differs = mask & ((position != own_position) | (position >= common[:, None]))
    wanted = differs[:, :, None] & (dim < HEAD_DIM)[None, None, :]
    here_at = here[:, :, None] * HEAD_DIM + dim[None, None, :]
    there_at = there[:, :, None] * HEAD_DIM + dim[None, None, :]
    k = tl.load(keys + there_at, mask=wanted, other=0.0)
    v = tl.load(values + there_at, mask=wanted, other=0.0)
    tl.debug_barrier()
    tl.store(positions + here, position, mask=mask)
    tl.store(scores + here, score, mask=mask)
    tl.store(keys + here_at, k, mask=wanted)
    tl.store(values + here_at, v, mask=wanted)


def take(
    keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor, parents: Tensor, shared: Tensor
) -> None:
    """Give row i what row ``parents[i]`` has.

    Parameters
    ----------
    keys, values, positions, scores
        The slots of a KeyformerLayer, which are changed.
    parents
        (batch,) int64.
    shared
        (batch, batch) int64: see :class:`keyformer.text.Text`.
    """
    batch, kv_heads, slots, head_dim = keys.shape
    dim_block = max(16, triton.next_power_of_2(head_dim))
    batch_block = triton.next_power_of_2(batch)
    block = max(1, 16384 // (batch_block * dim_block))
    _take[(triton.cdiv(slots, block), kv_heads)](
        keys,
        values,
        positions,
        scores,
        parents,
        shared,
        batch,
        slots,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        BATCH_BLOCK=batch_block,
        BLOCK=block,
        num_warps=8,
    )
