"""One new token a sequence: attention over the slots, scores and eviction, in one kernel.

Split-k decoding (flash decoding): each program reads a part of a head's slots with an online
softmax, so that one sequence fills the card; each key and value is read once, for all query heads
of its group (GQA). Further programs, which start last, wait for the parts of their head: one
joins them, another adds up the scores, finds the token that leaves and writes the new one over
it. It draws the noise while it waits. Where a head has more slots than a program's registers
hold, several do it, a range of slots each; the noisy softmax is then left to the parts, and who
leaves to the last that is done.

CUDA starts programs in any order and promises nothing to one that has not started. What a
program does is therefore decided as it starts, by its turn among those of its head: who waits
does so for earlier turns alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from keyformer import kernels
from keyformer.kernels.early import early, let_next_start, wait
from keyformer.kernels.noise import LOG2_E, head_row, query_row, spread, zeta
from keyformer.kernels.tiles import HIDDEN, slot_tile

STAYS = tl.constexpr(2**63 - 1)
"""The rank of a token that may not leave: eviction.STAYS."""

COUNTS = tl.constexpr(kernels.COUNTS)

PATIENCE = tl.constexpr(64)
"""Looks at the others' turns, of less than a microsecond each, before a program takes its own."""


@triton.jit
def _attend(
    query,
    keys,
    key_scales,
    values,
    value_scales,
    places,
    slopes,
    head,
    in_group,
    place,
    held,
    scale,
    logits,
    stats,
    outputs,
    pair,
    part,
    part_slots,
    slots,
    heads,
    parts,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIBI: tl.constexpr,
    SCORED: tl.constexpr,
    KEY_KIND: tl.constexpr,
    KEY_ELEMENTS: tl.constexpr,
    VALUE_KIND: tl.constexpr,
    VALUE_ELEMENTS: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Softmax and mean of values over a part of the slots, and the logits, for scores."""
    dim = tl.arange(0, DIM_BLOCK)
    real = in_group[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(query, mask=real, other=0.0)
    factor = scale * LOG2_E
    if ALIBI:
        slope = tl.load(slopes + tl.arange(0, GROUP_BLOCK), mask=in_group, other=0.0) * LOG2_E
    top = tl.full([GROUP_BLOCK], HIDDEN, tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    output = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    first = pair * slots
    keys += first * KEY_ELEMENTS
    values += first * VALUE_ELEMENTS
    key_scales += first * SCALES
    value_scales += first * SCALES
    end = tl.minimum(part * part_slots + part_slots, held)
    for start in range(part * part_slots, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        filled = slot < held
        k = slot_tile(
            keys,
            key_scales,
            start,
            held,
            q.dtype,
            KEY_KIND,
            SCALES,
            HEAD_DIM,
            DIM_BLOCK,
            BLOCK,
        )
        v = slot_tile(
            values,
            value_scales,
            start,
            held,
            q.dtype,
            VALUE_KIND,
            SCALES,
            HEAD_DIM,
            DIM_BLOCK,
            BLOCK,
        )
        x = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor
        if ALIBI:
            distance = tl.load(places + first + slot, mask=filled, other=0) - place
            x += slope[:, None] * distance.to(tl.float32)[None, :]
        x = tl.where(filled[None, :], x, HIDDEN)
        if SCORED:
            x_at = logits + head[:, None] * slots + slot[None, :]
            tl.store(x_at, x, mask=in_group[:, None] & filled[None, :])
        new_top = tl.maximum(top, tl.max(x, axis=1))
        weight = tl.exp2(x - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        output *= shrink[:, None]
        output = tl.dot(weight.to(v.dtype), v, output, input_precision="tf32x3")
        top = new_top

    at = head * parts + part
    tl.store(stats + at, top, mask=in_group)
    tl.store(stats + heads * parts + at, total, mask=in_group)
    tl.store(outputs + at[:, None] * HEAD_DIM + dim[None, :], output, mask=real)


@triton.jit
def _turn(finished, program, parts):
    """How many programs of this head have had their turn before this one: those that started.

    By their ids some are meant to wait. They let the others go first, for a while, since a
    processor that got parts to read in their stead would be the last to be done.
    """
    if program >= parts:
        tries = 0
        while tries < PATIENCE:
            tries += 1
            if tl.atomic_add(finished + 2, 0, sem="relaxed") >= parts:
                tries = PATIENCE
    return tl.atomic_add(finished + 2, 1, sem="relaxed")


@triton.jit
def _wait(finished, parts):
    """Until all parts of a head have been stored; their programs have started."""
    while tl.atomic_add(finished, 0) < parts:
        pass


@triton.jit
def _join(
    query,
    key,
    value,
    stats,
    outputs,
    output,
    finished,
    head,
    heads,
    parts,
    used,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """The output of a head, from its parts and the new token's own key and value."""
    dim = tl.arange(0, DIM_BLOCK)
    in_head = dim < HEAD_DIM
    q = tl.load(query + dim, mask=in_head, other=0.0).to(tl.float32)
    k = tl.load(key + dim, mask=in_head, other=0.0).to(tl.float32)
    mean = tl.load(value + dim, mask=in_head, other=0.0).to(tl.float32)
    top = tl.sum(q * k, axis=0) * (scale * LOG2_E)
    total = tl.full([], 1.0, tl.float32)
    _wait(finished, parts)
    for start in range(0, used, PARTS_BLOCK):
        part = start + tl.arange(0, PARTS_BLOCK)
        at = head * parts + part
        tops = tl.load(stats + at, mask=part < used, other=HIDDEN)
        totals = tl.load(stats + heads * parts + at, mask=part < used, other=0.0)
        means = tl.load(
            outputs + at[:, None] * HEAD_DIM + dim[None, :],
            mask=(part < used)[:, None] & in_head[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weight, shrink = tl.exp2(tops - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(totals * weight, axis=0)
        mean = mean * shrink + tl.sum(means * weight[:, None], axis=0)
        top = new_top
    tl.store(output + head * HEAD_DIM + dim, mean / total, mask=in_head)


@triton.jit
def _rank(
    score, position, seen, window_start, safe_before, POWER: tl.constexpr, STRIDE: tl.constexpr
):
    """:meth:`keyformer.eviction.Eviction.ranks` for real tokens: the lowest leaves."""
    if POWER != 0:
        age = (seen - position).to(tl.float32)
        score = score / (age if POWER == 1 else tl.exp2(POWER * tl.log2(age)))
    rank = (score.to(tl.int32, bitcast=True).to(tl.int64) << 31) + (0x7FFFFFFF - position)
    recent = position >= window_start
    if STRIDE > 1:
        recent = recent & (position % STRIDE == 0)
    return tl.where(recent | (position < safe_before), STAYS, rank)


@triton.jit
def _add_noise(
    logits,
    positions,
    first_slot,
    head,
    in_group,
    rows,
    sharpness,
    begin,
    end,
    slots,
    GROUP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Make the logits of a part those of the noisy softmax; its maximum and total."""
    top = tl.full([GROUP_BLOCK], HIDDEN, tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        filled = slot < end
        y_at = logits + head[:, None] * slots + slot[None, :]
        there = in_group[:, None] & filled[None, :]
        y = tl.load(y_at, mask=there, other=HIDDEN)
        if NOISE != "none":
            position = tl.load(positions + first_slot + slot, mask=filled, other=0)
            y += zeta(rows[:, None], spread(position)[None, :], NOISE)
        y = tl.where(there, y * sharpness, HIDDEN)
        tl.store(y_at, y, mask=there)
        new_top = tl.maximum(top, tl.max(y, axis=1))
        total *= tl.exp2(top - new_top)
        total += tl.sum(tl.where(there, tl.exp2(y - new_top[:, None]), 0.0), axis=1)
        top = new_top
    return top, total


@triton.jit
def _settle(
    query,
    key,
    stored_key,
    stored_value,
    stored_scales,
    keys,
    key_scales,
    values,
    value_scales,
    positions,
    scores,
    head,
    in_group,
    rows,
    sharpness,
    seen,
    held,
    budget,
    window,
    frozen_before,
    new_position,
    scale,
    forgetting,
    damping,
    logits,
    stats,
    candidates,
    new_scores,
    finished,
    pair,
    pairs,
    slots,
    heads,
    parts,
    used,
    settler,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
    NOISE: tl.constexpr,
    EVICTS: tl.constexpr,
    POWER: tl.constexpr,
    FROZEN: tl.constexpr,
    STRIDE: tl.constexpr,
    SINKS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    SETTLERS: tl.constexpr,
):
    """Add up the scores of a head's slots, and write the new token over the one that leaves."""
    dim = tl.arange(0, DIM_BLOCK)
    in_head = dim < HEAD_DIM
    slot = settler * BLOCK + tl.arange(0, BLOCK)
    filled = slot < held
    first_slot = pair * slots
    position = tl.load(positions + first_slot + slot, mask=filled, other=0).to(tl.int32)
    score = tl.zeros([BLOCK], tl.float32)
    new_key = tl.load(stored_key + dim, mask=dim < ELEMENTS, other=0)
    new_value = tl.load(stored_value + dim, mask=dim < ELEMENTS, other=0)
    new_score = tl.full([], 0.0, tl.float32)
    if SCORED:
        score = tl.load(scores + first_slot + slot, mask=filled, other=0.0)
        there = in_group[:, None] & filled[None, :]
        real = in_group[:, None] & in_head[None, :]
        q = tl.load(query, mask=real, other=0.0).to(tl.float32)
        k = tl.load(key + dim, mask=in_head, other=0.0).to(tl.float32)
        x = tl.sum(q * k[None, :], axis=1) * (scale * LOG2_E)
        if NOISE != "none":
            x += zeta(rows, spread(new_position), NOISE)
            if SETTLERS == 1:
                noise = zeta(rows[:, None], spread(position)[None, :], NOISE)
        x *= sharpness
    _wait(finished, parts)
    if SCORED:
        y_at = logits + head[:, None] * slots + slot[None, :]
        y = tl.load(y_at, mask=there, other=HIDDEN)
        if SETTLERS == 1:
            if NOISE != "none":
                y += noise
            y = tl.where(there, y * sharpness, HIDDEN)
            top = tl.maximum(x, tl.max(y, axis=1))
            total = tl.exp2(x - top) + tl.sum(tl.exp2(y - top[:, None]), axis=1)
        else:
            top, total = x, tl.full([GROUP_BLOCK], 1.0, tl.float32)
            for start in range(0, used, PARTS_BLOCK):
                part = start + tl.arange(0, PARTS_BLOCK)
                at = (2 * heads + head)[:, None] * parts + part[None, :]
                of_part = in_group[:, None] & (part < used)[None, :]
                tops = tl.load(stats + at, mask=of_part, other=HIDDEN)
                totals = tl.load(stats + heads * parts + at, mask=of_part, other=0.0)
                new_top = tl.maximum(top, tl.max(tops, axis=1))
                total *= tl.exp2(top - new_top)
                total += tl.sum(totals * tl.exp2(tops - new_top[:, None]), axis=1)
                top = new_top
        normal = top + tl.log2(total)
        new_score = tl.sum(tl.where(in_group, tl.exp2(x - normal), 0.0), axis=0) * damping
        score = score * forgetting + tl.sum(tl.exp2(y - normal[:, None]), axis=0) * damping
        tl.store(scores + first_slot + slot, score, mask=filled)

    if EVICTS:
        safe_before = tl.minimum(budget, SINKS)
        if FROZEN:
            safe_before = tl.maximum(safe_before, frozen_before)
        window_start = seen - STRIDE * window
        rank = _rank(score, position, seen, window_start, safe_before, POWER, STRIDE)
        rank = tl.where(filled, rank, STAYS)
        new_rank = _rank(new_score, new_position, seen, window_start, safe_before, POWER, STRIDE)
        leaving = tl.min(rank, axis=0)
        loser = tl.min(tl.where(rank == leaving, slot, slots), axis=0)
        is_last = True
        if SETTLERS > 1:
            candidates += pair * SETTLERS * 2
            tl.store(candidates + settler * 2, leaving)
            tl.store(candidates + settler * 2 + 1, loser.to(tl.int64))
            tl.debug_barrier()
            is_last = tl.atomic_add(finished + 1, 1) == SETTLERS - 1
            tl.store(finished + 1, 0, mask=is_last)
            each = tl.arange(0, SETTLERS) * 2
            ranks, losers = tl.load(candidates + each), tl.load(candidates + each + 1)
            leaving = tl.min(ranks, axis=0)
            loser = tl.min(tl.where(ranks == leaving, losers, slots), axis=0).to(tl.int32)
        target = first_slot + tl.where(held == budget, loser, held)
        stays = is_last & ((held < budget) | (leaving < new_rank))
        tl.debug_barrier()  # the slot's own score was stored by another thread
        tl.store(scores + target, new_score, mask=stays)
        tl.store(positions + target, new_position, mask=stays)
        tl.store(keys + target * ELEMENTS + dim, new_key, mask=(dim < ELEMENTS) & stays)
        tl.store(values + target * ELEMENTS + dim, new_value, mask=(dim < ELEMENTS) & stays)
        if SCALES > 0:
            group = tl.arange(0, SCALES_BLOCK)
            there = (group < SCALES) & stays
            scale = tl.load(stored_scales + pair * SCALES + group, mask=there)
            tl.store(key_scales + target * SCALES + group, scale, mask=there)
            scale = tl.load(stored_scales + (pairs + pair) * SCALES + group, mask=there)
            tl.store(value_scales + target * SCALES + group, scale, mask=there)
    else:
        tl.store(new_scores + pair, new_score, mask=settler == 0)


@triton.jit(do_not_specialize=["row"])
def step(
    query,
    key,
    value,
    stored_key,
    stored_value,
    stored_scales,
    slot_keys,
    slot_places,
    keys,
    key_scales,
    values,
    value_scales,
    positions,
    scores,
    slopes,
    seen,
    budgets,
    windows,
    frozen_before,
    new_positions,
    new_places,
    tau,
    logits,
    stats,
    outputs,
    candidates,
    output,
    new_scores,
    finished,
    sequences,
    query_stride_batch,
    query_stride_head,
    key_stride_batch,
    key_stride_head,
    value_stride_batch,
    value_stride_head,
    stored_key_stride_batch,
    stored_key_stride_head,
    stored_value_stride_batch,
    stored_value_stride_head,
    budget_stride_batch,
    budget_stride_head,
    slots,
    part_slots,
    scale,
    row,
    forgetting,
    damping,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SETTLE_BLOCK: tl.constexpr,
    NOISE_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    ALIBI: tl.constexpr,
    SCORED: tl.constexpr,
    NOISE: tl.constexpr,
    ONCE: tl.constexpr,
    EVICTS: tl.constexpr,
    POWER: tl.constexpr,
    FROZEN: tl.constexpr,
    STRIDE: tl.constexpr,
    SINKS: tl.constexpr,
    KEY_KIND: tl.constexpr,
    KEY_ELEMENTS: tl.constexpr,
    KIND: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALES_BLOCK: tl.constexpr,
    SETTLERS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Programs of a key/value head: for its parts, for each query head's output, for eviction.

    The grid is (batch * kv_heads, parts + GROUP + SETTLERS); vectors lie side by side, and what
    leads to them is told by strides where it is not dense.

    =================================== ==================================== ==================
    array                               shape                                dtype
    =================================== ==================================== ==================
    query                               (batch, heads, 1, HEAD_DIM)          model's
    key, value                          (batch, kv_heads, 1, HEAD_DIM)       model's
    stored_key, stored_value            (batch, kv_heads, 1, ELEMENTS)       of the slots
    stored_scales                       (2, batch, kv_heads, 1, SCALES)      float16
    slot_keys, keys                     (batch, kv_heads, slots, elements)   as read, as stored
    values                              (batch, kv_heads, slots, ELEMENTS)   of the slots
    key_scales, value_scales            (batch, kv_heads, slots, SCALES)     float16
    slot_places, positions              (batch, kv_heads, slots)             int64
    scores                              (batch, kv_heads, slots)             float32
    slopes                              (heads,)                             float32 or None
    seen, windows, frozen_before        (batch,)                             int64
    budgets                             (batch, kv_heads), by its strides    int64
    new_positions, new_places           (batch, 1)                           int64, -1 padding
    tau                                 ()                                   float32
    logits                              (batch * heads, slots)               float32, scratch
    stats                               (4, batch * heads, parts)            float32, scratch
    outputs                             (batch * heads, parts, HEAD_DIM)     float32, scratch
    candidates                          (batch * kv_heads * SETTLERS * 2,)   int64, scratch
    output                              (batch, 1, heads, HEAD_DIM)          model's
    new_scores                          (batch, kv_heads, 0 if EVICTS or 1)  float32
    finished                            (batch, kv_heads, COUNTS)            int32, zeros
    sequences                           (batch,)                             int64 or None
    =================================== ==================================== ==================
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    batch, kv_head = pair // KV_HEADS, pair % KV_HEADS
    finished += COUNTS * pair
    wait(EARLY)
    new_position = tl.load(new_positions + batch)
    seen_now = tl.load(seen + batch)
    budget = tl.load(budgets + batch * budget_stride_batch + kv_head * budget_stride_head)
    parts = tl.num_programs(1) - GROUP - SETTLERS
    part = _turn(finished, tl.program_id(1), parts)
    heads, first_head = pairs * GROUP, pair * GROUP
    dim = tl.arange(0, DIM_BLOCK)
    held = tl.minimum(seen_now - (new_position >= 0).to(tl.int64), budget).to(tl.int32)
    used = tl.cdiv(held, part_slots)
    query += batch * query_stride_batch + kv_head * GROUP * query_stride_head
    key += batch * key_stride_batch + kv_head * key_stride_head
    value += batch * value_stride_batch + kv_head * value_stride_head
    members = tl.arange(0, GROUP_ROWS)
    rows = tl.zeros([GROUP_ROWS], tl.uint32)
    if NOISE != "none":
        sequence = tl.load(sequences + batch)
        rows = query_row(head_row(row, sequence, kv_head * GROUP + members), new_position, ONCE)
    sharpness = 1.0
    if SCORED:
        sharpness = 1.0 / tl.load(tau)
    if part < parts:
        group = tl.arange(0, DOT_ROWS)
        place = 0
        if ALIBI:
            place = tl.load(new_places + batch)
        _attend(
            query + group[:, None].to(tl.int64) * query_stride_head + dim[None, :],
            slot_keys,
            key_scales,
            values,
            value_scales,
            slot_places,
            slopes + kv_head * GROUP if ALIBI else slopes,
            first_head + group,
            group < GROUP,
            place,
            held,
            scale,
            logits,
            stats,
            outputs,
            pair,
            part,
            part_slots,
            slots,
            heads,
            parts,
            HEAD_DIM,
            DIM_BLOCK,
            DOT_ROWS,
            BLOCK,
            ALIBI,
            SCORED,
            KEY_KIND,
            KEY_ELEMENTS,
            KIND,
            ELEMENTS,
            SCALES,
        )
        let_next_start(EARLY)
        if SCORED and SETTLERS > 1:
            tl.debug_barrier()  # what one thread has stored another may load
            top, total = _add_noise(
                logits,
                positions,
                pair * slots,
                first_head + members,
                members < GROUP,
                rows,
                sharpness,
                part * part_slots,
                tl.minimum(part * part_slots + part_slots, held),
                slots,
                GROUP_ROWS,
                NOISE_BLOCK,
                NOISE,
            )
            at = (2 * heads + first_head + members) * parts + part
            tl.store(stats + at, top, mask=members < GROUP)
            tl.store(stats + heads * parts + at, total, mask=members < GROUP)
        tl.debug_barrier()  # all threads have stored: the count tells of it
        tl.atomic_add(finished, 1)
    else:
        let_next_start(EARLY)
        member = part - parts
        if member < GROUP:
            _join(
                query + member.to(tl.int64) * query_stride_head,
                key,
                value,
                stats,
                outputs,
                output,
                finished,
                first_head + member,
                heads,
                parts,
                used,
                scale,
                HEAD_DIM,
                DIM_BLOCK,
                PARTS_BLOCK,
            )
        elif new_position >= 0:
            before = 0
            if FROZEN:
                before = tl.load(frozen_before + batch)
            _settle(
                query + members[:, None].to(tl.int64) * query_stride_head + dim[None, :],
                key,
                stored_key + batch * stored_key_stride_batch + kv_head * stored_key_stride_head,
                stored_value
                + batch * stored_value_stride_batch
                + kv_head * stored_value_stride_head,
                stored_scales,
                keys,
                key_scales,
                values,
                value_scales,
                positions,
                scores,
                first_head + members,
                members < GROUP,
                rows,
                sharpness,
                seen_now,
                held,
                budget,
                tl.load(windows + batch),
                before,
                new_position,
                scale,
                forgetting,
                damping,
                logits,
                stats,
                candidates,
                new_scores,
                finished,
                pair,
                pairs,
                slots,
                heads,
                parts,
                used,
                member - GROUP,
                HEAD_DIM,
                DIM_BLOCK,
                GROUP_ROWS,
                SETTLE_BLOCK,
                SCORED,
                NOISE,
                EVICTS,
                POWER,
                FROZEN,
                STRIDE,
                SINKS,
                ELEMENTS,
                SCALES,
                SCALES_BLOCK,
                PARTS_BLOCK,
                SETTLERS,
            )
        else:
            _wait(finished, parts)
        # The last to have waited leaves the counts as they were.
        if tl.atomic_add(finished, 1) == parts + GROUP + SETTLERS - 1:
            tl.store(finished, 0)
            tl.store(finished + 2, 0)


SETTLED = 2048
"""Logits and noise that a program holds to add up scores, of all heads that share a key."""

REGISTERS = 65536
"""What a processor has for the threads of all programs that it runs at a time."""


class Launch(NamedTuple):
    """How the work of a step is cut up.

    Attributes
    ----------
    part_slots, parts, settlers
        Slots of a part, parts of a head, and programs that settle who leaves.
    constants
        What else the kernel is compiled with.
    """

    part_slots: int
    parts: int
    settlers: int
    constants: dict[str, Any]


def launch(
    pairs: int, slots: int, group: int, vector_bytes: int, looked_at: int, device: torch.device
) -> Launch:
    """How to cut up a step.

    Parameters
    ----------
    pairs
        Of sequence and key/value head.
    group
        Query heads that share a key.
    vector_bytes
        Of a head's vector, padded to a power of two.
    looked_at
        Slots among which the one that leaves is looked for.
    """
    # Tensor cores take 16 rows at least.
    dot_rows = max(16, triton.next_power_of_2(group))
    group_rows = triton.next_power_of_2(group)
    block, warps, stages, resident = tiling(vector_bytes)
    settle_block = SETTLED // group_rows
    if looked_at > settle_block:  # several programs, which draw no noise, have more room
        settle_block = min(SETTLED, 2 * settle_block)
    settle_block = min(settle_block, triton.next_power_of_2(looked_at))
    settlers = triton.next_power_of_2(triton.cdiv(looked_at, settle_block))
    part_slots = split(pairs, slots, group + settlers, block, resident * processors(device))
    constants = {
        "BLOCK": block,
        "DOT_ROWS": dot_rows,
        "GROUP_ROWS": group_rows,
        "SETTLE_BLOCK": settle_block,
        "NOISE_BLOCK": min(SETTLED // group_rows, triton.next_power_of_2(part_slots)),
        "PARTS_BLOCK": 16,
        "SETTLERS": settlers,
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": REGISTERS // (32 * warps * resident) // 8 * 8,
        **early(device),
    }
    return Launch(part_slots, triton.cdiv(slots, part_slots), settlers, constants)


def tiling(vector_bytes: int) -> tuple[int, int, int, int]:
    """Slots read at a time, warps, tiles on their way, and programs that a processor runs."""
    return max(16, min(64, 16384 // vector_bytes)), 4, 3, 3


def split(pairs: int, slots: int, waiting: int, block: int, at_once: int) -> int:
    """Slots of a part, so that the programs of all ``pairs`` of sequence and head come out even.

    If there are few pairs, all their programs run at once, the ``waiting`` ones too. Else the
    number of rounds, of up to four, is that in which the programs at work fill the card best.
    """
    parts = at_once // pairs - waiting
    if parts <= 2 * waiting:
        rounds = max(range(1, 5), key=lambda n: n * at_once // pairs / n)
        parts = max(1, rounds * at_once // pairs)
    return triton.cdiv(triton.cdiv(slots, parts), block) * block


@functools.cache
def processors(device: torch.device) -> int:
    """How many can run programs; of an interpreter as many as split a small cache."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count
