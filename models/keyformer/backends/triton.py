"""The Triton backend: what the kernels of :mod:`keyformer.kernels` are told, and launched with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from keyformer.attention import Attended, AttentionSpec, Tokens
from keyformer.backends import torch as torch_backend
from keyformer.kernels import decode as decode_kernels
from keyformer.kernels import prefill as prefill_kernels
from keyformer.kernels import reorder as reorder_kernels
from keyformer.kernels.tiles import readable, readable_slopes
from keyformer.precision import quantize
from keyformer.rules.rule import Asked
from keyformer.score import Scorer
from keyformer.slots import Slots
from keyformer.text import Span

if TYPE_CHECKING:
    from keyformer.layer import KeyformerLayer

ALIGNED = 16
"""Bytes that a thread loads at once: slots begin at a multiple."""


def prefill(
    query: Tensor,
    slots: Tokens,
    new: Tokens,
    spec: AttentionSpec,
    span: Span,
    scorer: Scorer | None = None,
    library: bool = False,
) -> Attended:
    """:func:`keyformer.backends.torch.prefill` without weights; filled slots come before empty.

    Parameters
    ----------
    library
        Whether torch's own attention may give the output, where no scores of all queries are
        asked for, which come with it.
    """
    if scorer is not None and not scorer.config.asked:
        scorer = None
    query = readable(query)
    new = Tokens(*map(readable, (new.keys, new.values, new.positions, new.places)))
    slots = Tokens(
        slots.keys.contiguous(),
        slots.values.contiguous(),
        slots.positions.contiguous(),
        slots.places.contiguous(),
    )
    prompt = _Prompt(query, slots, new, spec, span)
    asked = scorer.config.asked if scorer is not None else ()
    of_all = any(one.of_all for one in asked)
    if library and not of_all:
        output, scoring = torch_backend.library_attention(query, new, spec), None
    else:
        output, scoring = prompt.attend(scorer if of_all else None)
    received = []
    for one in asked:
        if not one.of_all:
            assert scorer is not None
            _, scoring = prompt.attend(scorer, one)
        assert scoring is not None
        received.append(prompt.score(scoring, one))
    positions = new.positions
    if slots.positions.shape[-1]:
        positions = torch.cat([slots.positions, positions], dim=-1)
    return Attended(output, positions, tuple(received), None)


class _Scoring(NamedTuple):
    """What :meth:`_Prompt.score` needs of queries: log-sum-exps and hashes, and the scorer."""

    normal: Tensor
    hashes: Tensor
    scorer: Scorer


class _Prompt:
    """New tokens and slots as :mod:`keyformer.kernels.prefill` reads them."""

    def __init__(
        self, query: Tensor, slots: Tokens, new: Tokens, spec: AttentionSpec, span: Span
    ) -> None:
        self.query, self.slots, self.new, self.spec, self.span = query, slots, new, spec, span
        self.alibi_slopes = readable_slopes(spec.alibi_slopes)
        head_dim = query.shape[-1]
        self.kv_heads, self.held = slots.positions.shape[1:]
        self.filled = (slots.positions >= 0).sum(dim=-1) if self.held else None
        dim_block = max(16, triton.next_power_of_2(head_dim))
        tiling = prefill_kernels.tiling(dim_block * query.element_size())
        self.long, self.short, warps, stages = tiling
        self.shape: dict[str, Any] = {
            "GROUP": query.shape[1] // self.kv_heads,
            "HEAD_DIM": head_dim,
            "DIM_BLOCK": dim_block,
            "ALIBI": self.alibi_slopes is not None,
            "num_warps": warps,
            "num_stages": stages,
        }

    def attend(
        self, scorer: Scorer | None, asked: Asked | None = None
    ) -> tuple[Tensor, _Scoring | None]:
        """Output (batch, heads, queries, head_dim), and what scores need; or this alone.

        Parameters
        ----------
        asked
            The queries that scores need it of, and then there is no output; None for all.
        """
        query, slots, new = self.query, self.slots, self.new
        batch, heads, queries, head_dim = query.shape
        kind, most = _which(asked, queries)
        rows = queries if kind == "all" else min(queries, most)
        padded = triton.cdiv(rows, self.long) * self.long
        shown = queries if asked is None else 0
        output = query.new_empty(batch, shown, heads, head_dim)
        noise = "none" if scorer is None else scorer.noise_drawn
        sharpness = 1.0 if scorer is None else 1.0 / scorer.tau
        normal = query.new_empty(batch, heads, padded if scorer else 0, dtype=torch.float32)
        hashes = normal.new_empty(normal.shape if noise != "none" else 0, dtype=torch.int32)
        # One dimension: the others of a grid end at 65535 programs.
        prefill_kernels.attend[(padded // self.long * batch * heads,)](
            query,
            new.keys,
            new.values,
            slots.keys,
            slots.values,
            slots.positions,
            slots.places,
            self.alibi_slopes,
            self.filled,
            self.span.columns,
            output,
            normal,
            hashes,
            None if scorer is None else scorer.whose_noise(batch, query.device),
            *query.stride()[:3],
            *new.keys.stride()[:3],
            *new.values.stride()[:3],
            queries,
            padded,
            self.held,
            self.spec.scale,
            sharpness,
            math.log2(scorer.factor) if scorer is not None else 0.0,
            math.log2(scorer.config.forgetting) if scorer is not None else 0.0,
            0 if scorer is None else scorer.row,
            most,
            HEADS=heads,
            SLOTS=self.held > 0,
            SCORED=scorer is not None,
            TAU_IS_1=sharpness == 1.0,
            ONCE=scorer is not None and scorer.config.noise_schedule == "once",
            NOISY=noise != "none" or sharpness != 1.0,
            NOISE=noise,
            OUTPUT=asked is None,
            ASKED=kind,
            QUERY_BLOCK=self.long,
            KEY_BLOCK=self.short,
            **self.shape,
        )
        scoring = None if scorer is None else _Scoring(normal, hashes, scorer)
        return output.transpose(1, 2), scoring

    def score(self, scoring: _Scoring, asked: Asked) -> Tensor:
        """What the queries that are asked give, (batch, kv_heads, slots + queries) float32."""
        normal, hashes, scorer = scoring
        query, (batch, _, queries, _) = self.query, self.query.shape
        kind, most = _which(asked, queries)
        scores = normal.new_empty(batch, self.kv_heads, self.held + queries)
        for tokens, causal, at in ((self.slots, False, 0), (self.new, True, self.held)):
            keys = tokens.keys.shape[2]
            if not keys:
                continue
            prefill_kernels.score[(triton.cdiv(keys, self.long) * batch * self.kv_heads,)](
                query,
                tokens.keys,
                tokens.positions,
                tokens.places,
                self.alibi_slopes,
                self.span.columns,
                normal,
                hashes,
                scores[..., at:],
                *query.stride()[:3],
                *tokens.keys.stride()[:3],
                *tokens.positions.stride()[:2],
                *tokens.places.stride()[:2],
                self.held + queries,
                queries,
                normal.shape[-1],
                keys,
                self.spec.scale,
                1.0 / scorer.tau,
                most,
                KV_HEADS=self.kv_heads,
                QUERY_BLOCK=self.short,
                KEY_BLOCK=self.long,
                CAUSAL=causal,
                NOISE=scorer.noise_drawn,
                ASKED=kind,
                LARGEST=asked.kind == "largest",
                **self.shape,
            )
        return scores


def _which(asked: Asked | None, queries: int) -> tuple[str, int]:
    """Which queries of a forward are asked, as the kernels are told: a kind, and of how many."""
    if asked is None or asked.of_all:
        return "all", queries
    if asked.spread is not None:
        return "spread", asked.spread
    assert asked.queries is not None
    return "last", asked.queries


def step(
    layer: KeyformerLayer,
    query: Tensor,
    slots: Tokens,
    read: Tokens,
    new: Tokens,
    spec: AttentionSpec,
    scorer: Scorer | None,
    tau: Tensor,
    *,
    evicts: bool,
) -> tuple[Tensor, Tensor]:
    """Attend with one new token a sequence, add up scores, and write it over who leaves.

    What :meth:`KeyformerLayer.attend` and :meth:`KeyformerLayer.admit` do under the accumulated
    rule, without waiting for the device and without a number of this step among the arguments,
    so that the step can be replayed.

    Parameters
    ----------
    layer
        Whose slots are read and written.
    query
        (batch, heads, 1, head_dim).
    slots
        Those of the layer, with keys rotated if they are rotated when they are read.
    read, new
        The new tokens as attention reads them, and as they are stored but for quantization.
    scorer
        Whose noise and factor count; None where nothing is ranked.
    tau
        () float32: the temperature, in place of the scorer's.
    evicts
        False where the scores of other layers decide too: then nothing is written but scores.

    Returns
    -------
    tuple
        Output (batch, heads, 1, head_dim), and the new tokens' scores (batch, kv_heads, 1)
        float32, of use where nothing was evicted.
    """
    config, text, budget = layer.config, layer.text.on(query.device), layer.budget
    as_stored = slots.keys is layer.keys
    lay_out(layer)
    query, read_key = readable(query), readable(read.keys)
    value = readable(new.values)
    slot_keys, slot_places = slots.keys.contiguous(), slots.places.contiguous()
    alibi_slopes = readable_slopes(spec.alibi_slopes)
    batch, heads, _, head_dim = query.shape
    kv_heads, count = layer.positions.shape[1:]
    group = heads // kv_heads
    dim_block = max(16, triton.next_power_of_2(head_dim))
    scored = scorer is not None
    # Before slots are as many as the largest budget nobody leaves, and nobody is looked for.
    looked_at = count if scored or layer.largest_budget <= count else 1
    cut = decode_kernels.launch(
        *(batch * kv_heads, count, group, dim_block * query.element_size(), looked_at),
        query.device,
    )
    stored_key, stored_value, stored_scales = readable(new.keys), value, layer.key_scales
    if config.cache_dtype != "auto":
        pair = torch.stack([new.keys, new.values])
        (stored_key, stored_value), stored_scales = quantize(pair, config.cache_dtype)
    groups = layer.key_scales.shape[-1]

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    output = torch.empty((batch, 1, heads, head_dim), dtype=query.dtype, device=query.device)
    new_scores = scratch(batch, kv_heads, 0 if evicts else 1)
    decode_kernels.step[(batch * kv_heads, cut.parts + group + cut.settlers)](
        query,
        read_key,
        value,
        stored_key,
        stored_value,
        stored_scales,
        slot_keys,
        slot_places,
        layer.keys,
        layer.key_scales,
        layer.values,
        layer.value_scales,
        layer.positions,
        layer.scores,
        alibi_slopes,
        text.seen,
        budget,
        text.window,
        text.frozen_before,
        text.positions,
        text.places,
        tau,
        scratch(batch * heads, count if scored else 0),
        scratch(4, batch * heads, cut.parts),
        scratch(batch * heads, cut.parts, head_dim),
        torch.empty(batch * kv_heads * cut.settlers * 2, dtype=torch.int64, device=query.device),
        output,
        new_scores,
        layer.finished,
        scorer.whose_noise(batch, query.device) if scorer is not None else None,
        *query.stride()[:2],
        *read_key.stride()[:2],
        *value.stride()[:2],
        *stored_key.stride()[:2],
        *stored_value.stride()[:2],
        *budget.stride(),
        count,
        cut.part_slots,
        spec.scale,
        scorer.row if scorer is not None else 0,
        config.forgetting,
        scorer.factor if scorer is not None else 1.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        ALIBI=alibi_slopes is not None,
        SCORED=scored,
        NOISE=scorer.noise_drawn if scorer is not None else "none",
        ONCE=config.noise_schedule == "once",
        EVICTS=evicts,
        POWER=config.power_of_age,
        FROZEN=config.key_set == "frozen",
        STRIDE=config.dilation + 1,
        SINKS=config.sinks,
        KEY_KIND=config.cache_dtype if as_stored else "auto",
        KEY_ELEMENTS=slots.keys.shape[-1],
        KIND=config.cache_dtype,
        ELEMENTS=layer.values.shape[-1],
        SCALES=groups,
        SCALES_BLOCK=triton.next_power_of_2(max(1, groups)),
        **cut.constants,
    )
    return output.transpose(1, 2), new_scores


def reorder(layers: Sequence[Slots], parents: Tensor, shared: Tensor) -> None:
    """Give row i of the slots of layers what row ``parents[i]`` has, in one launch.

    Parameters
    ----------
    layers
        Whose slots are changed: all of one shape, on one device.
    parents
        (batch,) int64.
    shared
        (batch, batch) int64: see :class:`keyformer.text.Text`.
    """
    for layer in layers:
        lay_out(layer)
        layer.select_budget(parents)
    tensors = [getattr(layer, name) for layer in layers for name in layer.per_slot]
    batch, kv_heads, slots, row = layers[0].keys.shape
    groups = layers[0].key_scales.shape[-1]
    row_block = max(16, triton.next_power_of_2(row))
    batch_block = triton.next_power_of_2(batch)
    block = max(1, 16384 // (batch_block * row_block))
    reorder_kernels.take[(triton.cdiv(slots, block), kv_heads, len(layers))](
        *tensors[: len(layers[0].per_slot)],
        _table(tuple(tensor.data_ptr() for tensor in tensors), parents.device),
        parents.contiguous(),
        shared.contiguous(),
        batch,
        slots,
        KV_HEADS=kv_heads,
        ELEMENTS=row,
        ELEMENTS_BLOCK=row_block,
        SCALES=groups,
        SCALES_BLOCK=triton.next_power_of_2(max(1, groups)),
        BATCH_BLOCK=batch_block,
        BLOCK=block,
        num_warps=8,
    )


@functools.lru_cache(maxsize=64)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses where a kernel can read them; kept, since copying them waits for the device."""
    return torch.tensor(addresses, device=device)


def lay_out(layer: Slots) -> None:
    """Lay out the slots of a layer as the kernels that write them in place count on.

    Its own operations leave them so; this is for slots that somebody else has put there.
    """
    for name in layer.per_slot:
        slots = getattr(layer, name)
        if not slots.is_contiguous() or slots.data_ptr() % ALIGNED:
            setattr(layer, name, slots.clone(memory_format=torch.contiguous_format))
