"""What any of the last tokens looked at hard, in any head: for questions at the end of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keyformer.rules.observed import Observed
from keyformer.rules.rule import Asked, Candidates, pooled, remembered


@dataclass(frozen=True)
class Peak(Observed):
    """The largest attention from one of the last queries in one head of the layer.

    A few heads find what a question asks for, and look at nothing else: in a sum over heads and
    queries that is little, here it is all. Parameters and what is remembered are those of
    ``Observed``; all heads rank alike.
    """

    queries: int = 32

    @property
    def asks(self) -> Asked:  # type: ignore[override]
        """The largest from the last queries."""
        return Asked("largest", self.queries)

    def score(self, tokens: Candidates) -> Tensor:
        """The largest around it now, or what is left of the one before if that is more."""
        assert isinstance(tokens.received, Tensor)
        any_head = tokens.by_position(tokens.received).amax(dim=1, keepdim=True)
        found = tokens.at(pooled(any_head, self.pooling))
        return torch.maximum(remembered(tokens, self.queries), found)
