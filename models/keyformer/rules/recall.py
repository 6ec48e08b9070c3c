"""What a text is about and what its end asks for, in one score: this project's own rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keyformer.errors import InputError
from keyformer.rules.observed import Observed
from keyformer.rules.rule import Asked, Candidates, is_number, pooled


@dataclass(frozen=True)
class Recall(Observed):
    """Accumulated attention, and more for what one of the last queries looked at hard.

    Accumulated attention knows what a text is about, and loses what is mentioned once and asked
    for at the end: one query of a thousand looks at it. So the largest attention from the last
    queries, to the third power and averaged over neighbours in the text, is added to it. For each
    key/value head, with the sum and the largest of the query heads that share it:

        score = accumulated + strength * (all attention given so far) * pooled(largest ** power)

    The power leaves the sharp looks of a question, and next to nothing of the many faint ones of
    an instruction, for which the sum is the better guide. Looks at the first token, where
    attention goes that is not needed, and at the last ``queries`` tokens of the text, those that
    ask, do not count: they say nothing about their neighbours; of a prompt no longer than those
    nothing is added. In a decode step attention is accumulated, as in ``Accumulated``: what a
    prompt asked for keeps what that was worth. Each prompt on a cache and each chunk of one asks
    anew, so that in small chunks the looks weigh more; a chunk of one token is a step. What the
    end of a prompt in chunks asks for is evicted before, in part: feed it whole where it fits.

    Parameters
    ----------
    queries, pooling
        Those of ``Observed``.
    strength
        What an average of 1 counts for, in parts of all attention given so far; > 0.
    power
        Of the largest attention; > 0.

    Raises
    ------
    InputError
        If one of them is something else.
    """

    queries: int = 16
    pooling: int = 17
    strength: float = 1 / 32
    power: float = 3

    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "power"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise InputError(f"{name} must be a number > 0, got {value!r}")

    @property
    def asks(self) -> tuple[Asked, ...]:  # type: ignore[override]
        """The sum over all queries, and the largest from the last."""
        return Asked("sum"), Asked("largest", self.queries)

    def score(self, tokens: Candidates) -> Tensor:
        """What it had and receives, and after a prompt what was looked for."""
        assert isinstance(tokens.received, tuple)
        given, largest = tokens.received
        seen = tokens.seen[:, None, None]
        queries = tokens.queries[:, None, None].clamp(min=1)  # of none nothing is given
        all_given = given.sum(dim=-1, keepdim=True) * (seen / queries)
        counts = (tokens.positions > 0) & (tokens.positions < seen - self.queries)
        looks = torch.where(counts, largest**self.power, 0.0)
        looked_for = tokens.at(pooled(tokens.by_position(looks), self.pooling))
        asked = torch.where(queries > 1, self.strength * all_given * looked_for, 0.0)
        return tokens.before + given + asked
