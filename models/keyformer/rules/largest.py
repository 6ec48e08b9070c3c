"""The largest attention that any query ever gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule


@dataclass(frozen=True)
class Largest(Rule):
    """A token that mattered to one query once is worth as much as one that matters to many."""

    asks: ClassVar[Asked] = Asked("largest")

    def score(self, tokens: Candidates) -> Tensor:
        """The largest so far."""
        assert isinstance(tokens.received, Tensor)
        return torch.maximum(tokens.before, tokens.received)
