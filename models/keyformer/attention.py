"""Attention over cached slots and new tokens, in query chunks, returning output and scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keyformer.score import Scorer

Rotary = Callable[[Tensor, Tensor], Tensor]
"""Rotates (batch, heads, tokens, head_dim) by places (batch, heads or 1, tokens) int64."""

HIDDEN = -1e30
"""The logit of a key that a query may not see: finite also after a division by tau."""

CHUNK_ELEMENTS = {"cpu": 2**20, "gpu": 2**23}
"""Logits held at a time, in queries times keys over batch and heads: chunks of queries keep
memory linear in the prompt's length. On a CPU a chunk should stay in its cache."""


@dataclass
class Tokens:
    """Keys, values and positions of a set of tokens, in any order.

    Attributes
    ----------
    keys, values
        (batch, kv_heads, tokens, head_dim), the model's dtype.
    positions
        (batch, kv_heads, tokens) int64, position in the text, -1 for an empty slot or padding.
    places
        The same shape: the position that the model's position scheme is told, that in the
        text or the rank among the tokens left. Their order is that of ``positions``.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    places: Tensor

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(
            self.keys[:, :, part],
            self.values[:, :, part],
            self.positions[:, :, part],
            self.places[:, :, part],
        )

    def rotated(self, rotary: Rotary) -> Tokens:
        """These tokens with keys rotated to their places."""
        return replace(self, keys=rotary(self.keys, self.places))


@dataclass
class Attended:
    """What a set of queries gets from attention.

    Attributes
    ----------
    output
        (batch, heads, queries, head_dim), the model's dtype.
    positions
        (batch, kv_heads, tokens) int64: the slots' first, the new tokens' after them. From a
        decode kernel, which evicts by itself, the new tokens' alone.
    scores
        f_theta summed over the queries (section 3.3.2), float32, the shape of
        ``positions``; None without a scorer, and from a decode kernel.
    weights
        The plain softmax, float32, (batch, heads, queries, tokens) in the same order; None
        unless asked for.
    """

    output: Tensor
    positions: Tensor
    scores: Tensor | None
    weights: Tensor | None


def attention(
    query: Tensor,
    slots: Tokens,
    new: Tokens,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    scorer: Scorer | None = None,
    output_weights: bool = False,
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
    scale
        Factor of the query-key products, 1 / sqrt(head_dim) in Eq. 4.
    alibi_slopes
        (heads,) float32: adds slope * (key place - query place) to the logits.
    softcap
        Bends the products into (-softcap, softcap): softcap * tanh(x / softcap).
    window
        A query sees this many places, its own the last; None: all.
    scorer
        Ranks the tokens; None where nothing is ranked.
    output_weights
        Return the weights too, which takes memory quadratic in a prompt.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, held = slots.positions.shape[1:]
    group = heads // kv_heads
    # Scaled before the product, which in float16 could otherwise overflow.
    query = (query * scale).view(batch, kv_heads, group, queries, head_dim)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.view(kv_heads, group, 1, 1)
    scores = query.new_zeros(batch, kv_heads, held + queries, dtype=torch.float32)
    # Filled in place: small results kept between large temporaries would fragment the heap.
    output = torch.empty_like(query)
    weights = []
    last = new.positions[:, 0].amax(dim=-1)
    # Padding without a place of its own asks from that of the last token before it.
    asked = new.places[:, 0].cummax(dim=-1).values
    if held:
        asked = torch.where(asked < 0, slots.places[:, 0].amax(dim=-1, keepdim=True), asked)
    chunk_elements = CHUNK_ELEMENTS["cpu" if query.device.type == "cpu" else "gpu"]
    reach = queries if window is None else min(queries, 2 * window)
    chunk = max(1, chunk_elements // max(1, batch * heads * (held + reach)))
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        # From column to column places go up by one at least, so none before these is in reach.
        first = 0 if window is None else max(0, start + 1 - window)
        seen = new[first:end]
        asker = query[:, :, :, start:end].flatten(2, 3)
        asked_from = asked[:, start:end]
        places = torch.cat([slots.places, seen.places], dim=-1)
        known = torch.cat([slots.positions, seen.positions], dim=-1)

        # Two products instead of one over joined keys: joining would copy the whole cache.
        logits = torch.cat([asker @ t.keys.transpose(2, 3) for t in (slots, seen)], dim=-1)
        logits = logits.view(batch, kv_heads, group, end - start, held + end - first).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        distance = places[:, :, None, None, :] - asked_from[:, None, None, :, None]
        if alibi_slopes is not None:
            logits = logits + alibi_slopes * distance
        hidden = (distance > 0) | (known < 0)[:, :, None, None, :]
        if window is not None:
            hidden |= distance <= -window
        logits = logits.masked_fill(hidden, HIDDEN)

        probability = torch.softmax(logits, dim=-1)
        mixed = probability.to(new.values.dtype).flatten(2, 3)
        mean = mixed[..., :held] @ slots.values + mixed[..., held:] @ seen.values
        output[:, :, :, start:end] = mean.view(batch, kv_heads, group, end - start, head_dim)
        if scorer is not None:
            asked_at = new.positions[:, 0, start:end]
            with torch.no_grad():
                given = scorer(logits, asked_at, known, last)
            scores[..., :held] += given[..., :held]
            scores[..., held + first : held + end] += given[..., held:]
        if output_weights:
            every = probability.new_zeros(batch, heads, end - start, held + queries)
            every[..., :held] = probability[..., :held].flatten(1, 2)
            every[..., held + first : held + end] = probability[..., held:].flatten(1, 2)
            weights.append(every)
    return Attended(
        output=output.flatten(1, 2),
        positions=torch.cat([slots.positions, new.positions], dim=-1),
        scores=scores if scorer is not None else None,
        weights=torch.cat(weights, dim=2) if output_weights else None,
    )
