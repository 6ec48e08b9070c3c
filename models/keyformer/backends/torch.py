"""The torch backend: attention in query chunks, so that nothing is quadratic in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keyformer.attention import HIDDEN, Attended, AttentionSpec, Tokens
from keyformer.eviction import Eviction
from keyformer.score import Scorer
from keyformer.slots import Slots

if TYPE_CHECKING:
    from keyformer.layer import KeyformerLayer

CHUNK_ELEMENTS = {"cpu": 2**20, "gpu": 2**23}
"""Logits held at a time, in queries times keys over batch and heads: chunks of queries keep
memory linear in the prompt's length. On a CPU a chunk should stay in its cache."""


def prefill(
    query: Tensor,
    slots: Tokens,
    new: Tokens,
    spec: AttentionSpec,
    scorer: Scorer | None = None,
    output_weights: bool = False,
    unbroken: bool = False,
) -> Attended:
    """Attend from new tokens to cached slots and, causally, to each other.

    The output uses the plain softmax of x (Eq. 4); noise and temperature touch only the
    scores. A key is seen by every query at its own or a later place. Padding queries see
    what the last token before them does, unless they have a place, and give no score.

    Parameters
    ----------
    query
        (batch, heads, queries, head_dim), one of each new token; heads is a multiple of
        kv_heads.
    slots, new
        Cached tokens in any order, and the new ones in theirs, alike in all heads.
    spec
        How the layer attends; keys are rotated already.
    scorer
        Ranks the tokens; None where nothing is ranked.
    output_weights
        Return the weights too, which takes memory quadratic in a prompt.
    unbroken
        Whether no sequence has padding among its new tokens.
    """
    if unbroken and is_plain(slots, spec) and not (output_weights or scorer):
        return Attended(library_attention(query, new, spec), new.positions, (), None)
    batch, heads, queries, head_dim = query.shape
    kv_heads, held = slots.positions.shape[1:]
    group = heads // kv_heads
    alibi_slopes, softcap, window = spec.alibi_slopes, spec.softcap, spec.window
    # Scaled before the product, which in float16 could otherwise overflow.
    query = (query * spec.scale).view(batch, kv_heads, group, queries, head_dim)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.view(kv_heads, group, 1, 1)
    asked = scorer.config.asked if scorer is not None else ()
    received = tuple(
        query.new_zeros(batch, kv_heads, held + queries, dtype=torch.float32) for _ in asked
    )
    # Filled in place: small results kept between large temporaries would fragment the heap.
    output = torch.empty_like(query)
    weights = []
    last = new.positions[:, 0].amax(dim=-1)
    first_new = last - (new.positions[:, 0] >= 0).sum(dim=-1) + 1
    # Padding without a place of its own asks from that of the last token before it.
    asking = new.places[:, 0].cummax(dim=-1).values
    if held:
        asking = torch.where(asking < 0, slots.places[:, 0].amax(dim=-1, keepdim=True), asking)
    chunk_elements = CHUNK_ELEMENTS["cpu" if query.device.type == "cpu" else "gpu"]
    reach = queries if window is None else min(queries, 2 * window)
    chunk = max(1, chunk_elements // max(1, batch * heads * (held + reach)))
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        # From column to column places go up by one at least, so none before these is in reach.
        first = 0 if window is None else max(0, start + 1 - window)
        seen = new[first:end]
        asker = query[:, :, :, start:end].flatten(2, 3)
        asked_from = asking[:, start:end]
        places = torch.cat([slots.places, seen.places], dim=-1)
        known = torch.cat([slots.positions, seen.positions], dim=-1)

        # Two products instead of one over joined keys: joining would copy the whole cache.
        products = [asker @ t.keys.transpose(2, 3) for t in ((slots, seen) if held else (seen,))]
        logits = torch.cat(products, dim=-1) if held else products[0]
        logits = logits.view(batch, kv_heads, group, end - start, held + end - first).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        distance = places[:, :, None, None, :] - asked_from[:, None, None, :, None]
        if alibi_slopes is not None:
            logits = logits + alibi_slopes * distance
        hidden = (distance > 0) | (known < 0)[:, :, None, None, :]
        if window is not None:
            hidden |= distance <= -window
        logits = logits.masked_fill_(hidden, HIDDEN)

        probability = torch.softmax(logits, dim=-1)
        mixed = probability.to(new.values.dtype).flatten(2, 3)
        mean = mixed[..., held:] @ seen.values
        if held:
            mean = mean + mixed[..., :held] @ slots.values
        output[:, :, :, start:end] = mean.view(batch, kv_heads, group, end - start, head_dim)
        if scorer is not None:
            asked_at = new.positions[:, 0, start:end]
            with torch.no_grad():
                given = scorer(logits, probability, asked_at, known, first_new, last)
            for one, every, some in zip(asked, received, given, strict=True):
                if some is None:
                    continue
                one.merge(every[..., :held], some[..., :held])
                one.merge(every[..., held + first : held + end], some[..., held:])
        if output_weights:
            every = probability.new_zeros(batch, heads, end - start, held + queries)
            every[..., :held] = probability[..., :held].flatten(1, 2)
            every[..., held + first : held + end] = probability[..., held:].flatten(1, 2)
            weights.append(every)
    return Attended(
        output=output.flatten(1, 2),
        positions=torch.cat([slots.positions, new.positions], dim=-1),
        received=received,
        weights=torch.cat(weights, dim=2) if output_weights else None,
    )


def is_plain(slots: Tokens, spec: AttentionSpec) -> bool:
    """Whether new tokens attend to each other alone, by nothing but their products."""
    bent = spec.softcap is not None or spec.window is not None or spec.alibi_slopes is not None
    return not bent and not slots.positions.shape[-1]


def library_attention(query: Tensor, new: Tokens, spec: AttentionSpec) -> Tensor:
    """torch's own causal attention: output (batch, heads, queries, head_dim)."""
    return scaled_dot_product_attention(
        query, new.keys, new.values, is_causal=True, scale=spec.scale, enable_gqa=True
    )


@torch.no_grad()
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
    """:func:`keyformer.backends.triton.step`, in few operations; the scorer knows ``tau``, too."""
    config, text, budget = layer.config, layer.text.on(query.device), layer.budget
    batch, heads, _, head_dim = query.shape
    kv_heads, count = layer.positions.shape[1:]
    real = new.positions >= 0
    filled = (text.seen[:, None] - 1).minimum(budget)[..., None]
    new_scores = layer.scores.new_zeros(real.shape)
    if evicts and _appends(layer, slots, spec):
        layer.put(new, new_scores, filled, real)
        keys, values = (held[:, :, : text.length] for held in (layer.keys, layer.values))
        output = scaled_dot_product_attention(
            query, keys, values, scale=spec.scale, enable_gqa=True
        )
        return output, new_scores
    query = (query * spec.scale).view(batch, kv_heads, heads // kv_heads, head_dim)
    logits = torch.cat([query @ t.keys.transpose(2, 3) for t in (slots, read)], dim=-1).float()
    positions = torch.cat([slots.positions, new.positions], dim=-1)
    if spec.alibi_slopes is not None:
        distance = torch.cat([slots.places - read.places, read.places * 0], dim=-1)
        logits += spec.alibi_slopes.view(kv_heads, -1, 1) * distance[:, :, None]
    logits = logits.masked_fill_((positions < 0)[:, :, None], HIDDEN)
    plain = torch.softmax(logits, dim=-1)
    mixed = plain.to(read.values.dtype)
    output = mixed[..., :count] @ slots.values + mixed[..., count:] * read.values
    output = output.view(batch, heads, 1, head_dim)
    if scorer is not None:
        given = scorer.softmax(
            logits.unsqueeze(3), plain.unsqueeze(3), new.positions[:, 0], positions
        )
        given = given.sum(dim=(2, 3)) * (real * scorer.factor)
        if config.forgetting < 1:
            layer.scores *= config.forgetting ** text.taken[:, None, None]
        layer.scores += given[..., :count]
        new_scores = given[..., count:]
    if evicts and config.never_evicts:
        layer.put(new, new_scores, filled, real)
    elif evicts:
        every = torch.cat([layer.scores, new_scores], dim=-1)
        loser = Eviction(config, text, budget, layer.window).loser(positions, every)
        full = filled == budget[..., None]
        stays = real & (~full | (loser < count))
        place = torch.where(full, loser, filled).clamp(max=count - 1)
        layer.put(new, new_scores, place, stays)
    return output, new_scores


def _appends(layer: KeyformerLayer, slots: Tokens, spec: AttentionSpec) -> bool:
    """Whether a step only adds a token to a text that is there as attention reads it."""
    plain = layer.kind == "auto" and slots.keys is layer.keys and not layer.text.columns.padded
    return plain and layer.config.never_evicts and spec.alibi_slopes is None


def reorder(layers: Sequence[Slots], parents: Tensor, shared: Tensor) -> None:
    """Give row i of the slots of layers what row ``parents[i]`` has, whatever they share."""
    for layer in layers:
        layer.select(parents)
