"""What attention reads and gives, and how a model's layer attends: alike on all backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

Rotary = Callable[[Tensor, Tensor], Tensor]
"""Rotates (batch, heads, tokens, head_dim) by places (batch, heads or 1, tokens) int64."""

HIDDEN = -1e30
"""The logit of a key that a query may not see: finite also after a division by tau."""


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """How a layer attends.

    Attributes
    ----------
    scale
        Factor of the query-key products, 1 / sqrt(head_dim) in Eq. 4.
    alibi_slopes
        (heads,) float32: adds slope * (key place - query place) to the logits.
    softcap
        Bends the products into (-softcap, softcap): softcap * tanh(x / softcap).
    window
        A query sees this many places, its own the last; None: all.
    rotary
        Rotates queries and keys to their places. Where the place of a token changes as
        others leave, its key is stored unrotated and rotated whenever it is read.
    """

    scale: float
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    window: int | None = None
    rotary: Rotary | None = None


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
    received
        For each of :attr:`keyformer.KeyformerConfig.asked` what the queries gave (section 3.3.2),
        float32, the shape of ``positions``; empty without a scorer, and from a decode kernel.
    weights
        The plain softmax, float32, (batch, heads, queries, tokens) in the same order; None
        unless asked for.
    """

    output: Tensor
    positions: Tensor
    received: tuple[Tensor, ...]
    weights: Tensor | None
