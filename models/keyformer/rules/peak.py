"""What any of the last tokens looked at hard, in any head: for questions at the end of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule, check_whole, pooled, remembered


@dataclass(frozen=True)
class Peak(Rule):
    """The largest attention from one of the last queries in one head of the layer.

    A few heads find what a question asks for, and look at nothing else: in a sum over heads and
    queries that is little, here it is all. Averaged over neighbours in the text, so that what
    is found stays whole, and the same in all heads.

    After a decode step what was found before counts (1 - 1 / queries) times as much.

    Parameters
    ----------
    queries
        The last tokens of a prompt that are asked, at least 1.
    pooling
        Neighbours that are averaged over, the token itself the middle one; odd.

    Raises
    ------
    InputError
        If one of them is something else.
    """

    queries: int = 32
    pooling: int = 5

    def __post_init__(self) -> None:
        check_whole("queries", self.queries)
        check_whole("pooling", self.pooling, odd=True)

    @property
    def asks(self) -> Asked:  # type: ignore[override]
        """The largest from the last queries."""
        return Asked("largest", self.queries)

    def score(self, tokens: Candidates) -> Tensor:
        """The largest around it now, or what is left of the one before if that is more."""
        assert tokens.received is not None
        any_head = tokens.by_position(tokens.received).amax(dim=1, keepdim=True)
        found = tokens.at(pooled(any_head, self.pooling))
        return torch.maximum(remembered(tokens, self.queries), found)
