"""Beams that change parents, in place: only what two rows do not have in common is copied.

Beams share most of their text. Two rows that were copies of one another some steps ago
differ in few slots since, so a beam that takes another's place costs its scores and
positions and those few keys and values, not its cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take(
    first_keys,
    first_key_scales,
    first_values,
    first_value_scales,
    first_positions,
    first_scores,
    addresses,
    parents,
    shared,
    batch,
    slots,
    KV_HEADS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ELEMENTS_BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_BLOCK: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All rows of some slots of a head: everything is read before anything is written.

    Of the first layer's tensors only the types are used.
    """
    addresses += tl.program_id(2) * 6
    keys = tl.multiple_of(tl.load(addresses).to(first_keys.dtype), 16)
    key_scales = tl.load(addresses + 1).to(first_key_scales.dtype)
    values = tl.multiple_of(tl.load(addresses + 2).to(first_values.dtype), 16)
    value_scales = tl.load(addresses + 3).to(first_value_scales.dtype)
    positions = tl.multiple_of(tl.load(addresses + 4).to(first_positions.dtype), 16)
    scores = tl.multiple_of(tl.load(addresses + 5).to(first_scores.dtype), 16)
    row, slot = tl.arange(0, BATCH_BLOCK), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    element = tl.arange(0, ELEMENTS_BLOCK)
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
    wanted = differs[:, :, None] & (element < ELEMENTS)[None, None, :]
    here_at = here[:, :, None] * ELEMENTS + element[None, None, :]
    there_at = there[:, :, None] * ELEMENTS + element[None, None, :]
    k = tl.load(keys + there_at, mask=wanted, other=0)
    v = tl.load(values + there_at, mask=wanted, other=0)
    if SCALES > 0:
        group = tl.arange(0, SCALES_BLOCK)
        scaled = differs[:, :, None] & (group < SCALES)[None, None, :]
        scale_at = here[:, :, None] * SCALES + group[None, None, :]
        parent_scale_at = there[:, :, None] * SCALES + group[None, None, :]
        k_scale = tl.load(key_scales + parent_scale_at, mask=scaled, other=0)
        v_scale = tl.load(value_scales + parent_scale_at, mask=scaled, other=0)
        tl.debug_barrier()
        tl.store(key_scales + scale_at, k_scale, mask=scaled)
        tl.store(value_scales + scale_at, v_scale, mask=scaled)
    tl.debug_barrier()
    tl.store(positions + here, position, mask=mask)
    tl.store(scores + here, score, mask=mask)
    tl.store(keys + here_at, k, mask=wanted)
    tl.store(values + here_at, v, mask=wanted)
