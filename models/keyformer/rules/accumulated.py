"""Accumulated attention: Keyformer's score function and, without noise, H2O's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule


@dataclass(frozen=True)
class Accumulated(Rule):
    """f_theta of section 3.3.2: all attention that a token has received since it came."""

    asks: ClassVar[Asked] = Asked("sum")
    accumulates: ClassVar[bool] = True

    def score(self, tokens: Candidates) -> Tensor:
        """What it had, and what it receives."""
        assert isinstance(tokens.received, Tensor)
        return tokens.before + tokens.received
