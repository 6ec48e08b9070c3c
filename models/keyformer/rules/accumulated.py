"""Accumulated attention: Keyformer's score function and, without noise, H2O's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule


@dataclass(frozen=True)
class Accumulated(Rule):
    """f_theta of section 3.3.2: all attention that a token has received since it came.

    With ``forgetting`` below 1 what was received earlier counts less with each token that comes.
    """

    asks: ClassVar[Asked] = Asked("sum")

    def score(self, tokens: Candidates) -> Tensor:
        """What it had, and what it receives."""
        assert tokens.received is not None
        kept = tokens.config.forgetting ** tokens.queries[:, None, None]
        return tokens.before * kept + tokens.received
