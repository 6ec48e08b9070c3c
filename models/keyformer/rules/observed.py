"""What the last tokens look at: SnapKV's rule (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule, check_whole, pooled, remembered


@dataclass(frozen=True)
class Observed(Rule):
    """Attention from the last queries alone, averaged over neighbours in the text.

    SnapKV ranks a prompt once. This goes on: after a decode step what was received before counts
    (1 - 1 / queries) times as much, so that about as many queries are remembered.

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

    queries: int = 64
    pooling: int = 5

    def __post_init__(self) -> None:
        check_whole("queries", self.queries)
        check_whole("pooling", self.pooling, odd=True)

    @property
    def asks(self) -> Asked:  # type: ignore[override]
        """The sum over the last queries."""
        return Asked("sum", self.queries)

    def score(self, tokens: Candidates) -> Tensor:
        """What it receives and its neighbours do, and what is remembered."""
        assert isinstance(tokens.received, Tensor)
        received = tokens.at(pooled(tokens.by_position(tokens.received), self.pooling))
        return remembered(tokens, self.queries) + received
