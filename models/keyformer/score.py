"""The score function: logit noise, temperature, and the softmax that ranks tokens.

Noise is a hash of (seed, layer, sequence, head, query, key), so it does not depend on how
the work is split into chunks, and another implementation can draw the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from keyformer.config import KeyformerConfig
from keyformer.rules import Asked

GUMBEL_MEAN = 0.57721566490153286
GUMBEL_STD = math.pi / math.sqrt(6)
ALL = Asked("sum")
"""Every query, as the paper sums them up."""

_GOLDEN = torch.tensor(-1640531527, dtype=torch.int32)
"""2**32 / golden ratio as a signed 32-bit integer: spreads consecutive keys. A tensor, as the other
constants of the hash: torch makes one of a number at each operation, which takes as long as it."""
_SIXTEEN, _LOW, _NINE, _FRACTION = torch.tensor(
    (16, 0xFFFF, 9, 0x7FFFFF), dtype=torch.int32
).unbind()
_ROUNDS = [
    torch.tensor(numbers, dtype=torch.int32).unbind()
    for numbers in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, -2073254261))
]


def temperature(config: KeyformerConfig, step: int, generation_length: int | None) -> float:
    """tau_t of Eq. 10 at decode step ``step`` (0 is the prompt) of ``generation_length``.

    Without a known length the temperature stays at ``tau_init``.
    """
    if generation_length is None:
        return config.tau_init
    progress = min(step / generation_length, 1.0)
    return config.tau_init + progress * (config.tau_end - config.tau_init)


def noise(
    kind: str,
    seed: int,
    layer: int,
    heads: int,
    query_positions: Tensor,
    key_positions: Tensor,
    sequences: Tensor | None = None,
) -> Tensor:
    """zeta of Eq. 4: the only place where a random number is drawn.

    Parameters
    ----------
    kind
        One of ``config.NOISES``.
    seed, layer
        Counters shared by the whole call; ``seed`` below 2**63.
    heads
        Query heads H, a multiple of the key/value heads.
    query_positions
        (batch, queries) int64, positions in the text.
    key_positions
        (batch, kv_heads, keys) int64, positions in the text.
    sequences
        (batch,) int64, which sequence's noise each row of the batch draws, from its last 32 bits;
        None for the row's own number.

    Returns
    -------
    Tensor
        float32, (batch, heads, queries, keys); for "constant" and "none" a single number.
    """
    device = query_positions.device
    if kind == "none":
        return torch.zeros((), device=device)
    if kind == "constant":
        return torch.full((), GUMBEL_MEAN, device=device)
    drawn = uniform(seed, layer, heads, query_positions, key_positions, sequences)
    if kind == "gumbel":
        return drawn.log_().neg_().log_().neg_()
    return GUMBEL_MEAN + GUMBEL_STD * torch.special.ndtri(drawn)


def uniform(
    seed: int,
    layer: int,
    heads: int,
    query_positions: Tensor,
    key_positions: Tensor,
    sequences: Tensor | None = None,
) -> Tensor:
    """What :func:`noise` makes its numbers of: in (0, 1), of the same shape."""
    device = query_positions.device
    batch, kv_heads, _ = key_positions.shape
    if sequences is None:
        row = _head_rows(seed, layer, heads, batch).to(device)
    else:
        row = _taken_on(first_row(seed, layer), heads, sequences.to(device))
    row = _mix(row ^ query_positions[:, None, :, None].to(torch.int32) * _GOLDEN)
    column = key_positions.to(torch.int32) * _GOLDEN
    bits = _mix(row.unflatten(1, (kv_heads, -1)) + column[:, :, None, None]).flatten(1, 2)
    bits = bits.bitwise_right_shift_(_NINE).bitwise_and_(_FRACTION)
    return bits.float().add_(0.5).mul_(2.0**-23)  # both ends excluded, exact in float32


@lru_cache(maxsize=1024)
def first_row(seed: int, layer: int) -> int:
    """The hash of the counters that a whole call shares, a signed 32-bit integer."""
    row = torch.zeros((), dtype=torch.int32)
    for counter in (seed, seed >> 32, layer):
        row = _mix(row ^ torch.tensor(_signed32(counter), dtype=torch.int32) * _GOLDEN)
    return int(row)


@lru_cache(maxsize=1024)
def _head_rows(seed: int, layer: int, heads: int, batch: int) -> Tensor:
    """:func:`_taken_on` where each row of the batch draws its own number, on the CPU."""
    return _taken_on(first_row(seed, layer), heads, torch.arange(batch))


def _taken_on(row: int, heads: int, sequences: Tensor) -> Tensor:
    """The hash of a call taken on to sequences and query heads, (batch, heads, 1, 1) int32."""
    rows = torch.full((), row, dtype=torch.int32, device=sequences.device)
    for counter in (sequences[:, None], torch.arange(heads, device=sequences.device)):
        rows = _mix(rows ^ counter.to(torch.int32) * _GOLDEN)
    return rows[:, :, None, None]


def _signed32(value: int) -> int:
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _mix(bits: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every input bit flips every output bit."""
    for shift, mask, factor in _ROUNDS:
        bits = bits.bitwise_right_shift(shift).bitwise_and_(mask).bitwise_xor_(bits).mul_(factor)
    return bits.bitwise_right_shift(_SIXTEEN).bitwise_and_(_LOW).bitwise_xor_(bits)


@dataclass(frozen=True)
class Scorer:
    """f_theta of one layer at one step (Eq. 9): softmax of (x + zeta) / tau.

    Attributes
    ----------
    config
        Kind and schedule of the noise, and forgetting.
    seed, layer, sequences
        Those of :func:`noise`.
    tau
        That of :func:`temperature`.
    factor
        Of every score that is given.
    """

    config: KeyformerConfig
    seed: int
    layer: int
    tau: float
    factor: float = 1.0
    sequences: Tensor | None = None

    @property
    def row(self) -> int:
        """Where the hash of this layer's noise begins."""
        return first_row(self.seed, self.layer)

    @property
    def noise_drawn(self) -> str:
        """The kind of noise that can change a score: a constant cannot."""
        return self.config.noise if self.config.draws_noise else "none"

    def whose_noise(self, rows: int, device: torch.device) -> Tensor | None:
        """(rows,) int64, the ``sequences`` of :func:`noise`; None where it draws nothing."""
        if self.noise_drawn == "none":
            return None
        if self.sequences is None:
            return torch.arange(rows, device=device)
        return self.sequences.to(device)

    def weight(
        self, query_positions: Tensor, first: Tensor, last: Tensor, asked: Asked = ALL
    ) -> Tensor:
        """How much each query's softmax counts.

        Parameters
        ----------
        query_positions
            (batch, queries) int64, -1 for padding, which gives no score.
        first, last
            (batch,) int64, the positions of the first and the last query of the forward; from the
            last on nothing is forgotten.
        asked
            Which queries count.

        Returns
        -------
        Tensor
            (batch, queries) float32.
        """
        age = last[:, None] - query_positions
        weight = self.factor * self.config.forgetting ** age.float()
        counts = query_positions >= 0
        if asked.queries is not None:
            counts &= age < asked.queries
        if asked.spread is not None:
            step = asked.steps(last - first + 1)[:, None]
            counts &= age % step == 0
            weight = weight * step.minimum(query_positions - first[:, None] + 1)
        return weight.masked_fill(~counts, 0.0)

    def softmax(
        self, logits: Tensor, plain: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> Tensor:
        """f_theta of each query for each key (Eq. 9), under noise and temperature.

        Parameters
        ----------
        logits
            x of Eq. 4, very low and finite where masked, float32,
            (batch, kv_heads, group, queries, keys).
        plain
            The softmax of ``logits``, of the same shape.
        query_positions
            (batch, queries) int64, -1 for padding.
        key_positions
            (batch, kv_heads, keys) int64.
        """
        kind, heads = self.noise_drawn, logits.shape[1] * logits.shape[2]
        if kind == "none":
            return plain if self.tau == 1 else torch.softmax(logits / self.tau, dim=-1)
        if self.config.noise_schedule == "once":
            query_positions = torch.zeros_like(query_positions)
        drawn = self.seed, self.layer, heads, query_positions, key_positions, self.sequences
        if kind == "gumbel" and self.tau == 1:
            # exp(x - log(-log u)) is exp(x) / -log u: the exponentials are there already.
            raised = plain / uniform(*drawn).log_().view(logits.shape)
            return raised.div_(raised.sum(dim=-1, keepdim=True))
        zeta = noise(kind, *drawn).view(logits.shape)
        return torch.softmax((logits + zeta) / self.tau, dim=-1)

    def __call__(
        self,
        logits: Tensor,
        plain: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        first: Tensor,
        last: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """What queries together give to each key, of all that is asked.

        Parameters
        ----------
        logits, plain, query_positions, key_positions
            Those of :meth:`softmax`.
        first, last
            See :meth:`weight`.

        Returns
        -------
        tuple
            For each of :attr:`KeyformerConfig.asked`, float32, (batch, kv_heads, keys); None
            where none of the queries is asked.
        """
        asked = self.config.asked
        if not asked:
            return ()
        weights = [self.weight(query_positions, first, last, one) for one in asked]
        # Most of a prompt need not be looked at where not all of its queries are asked.
        if not any(one.of_all for one in asked):
            counting = torch.stack(weights).any(dim=1)
            looked_at = counting.any(dim=0).nonzero()[:, 0]
            if not len(looked_at):
                return (None,) * len(asked)
            logits, plain = logits[..., looked_at, :], plain[..., looked_at, :]
            query_positions = query_positions[:, looked_at]
            weights = [weight[:, looked_at] for weight in weights]
        given = self.softmax(logits, plain, query_positions, key_positions)
        return tuple(
            self._together(one, given, weight, query_positions, key_positions, first, last)
            if one.of_all or bool(weight.any())
            else None
            for one, weight in zip(asked, weights, strict=True)
        )

    def _together(
        self,
        asked: Asked,
        given: Tensor,
        weight: Tensor,
        query_positions: Tensor,
        key_positions: Tensor,
        first: Tensor,
        last: Tensor,
    ) -> Tensor:
        """What is asked of ``given`` (batch, kv_heads, group, queries, keys)."""
        if asked.kind == "largest":
            return (given * weight[:, None, None, :, None]).amax(dim=(2, 3))
        if asked.spread is not None:
            closest = (asked.steps(last - first + 1) - 1)[:, None, None, None]
            keys = key_positions[:, :, None, :]
            near = query_positions[:, None, :, None] - keys < closest
            near &= keys >= first[:, None, None, None]  # slots are alike far from all
            given = given.masked_fill(near[:, :, None], 0)
        return (weight[:, None, None, None] @ given).sum(dim=(2, 3))
