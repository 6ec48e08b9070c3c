"""What the last token looks at, all heads together: TOVA's rule (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule, check_whole, pooled


@dataclass(frozen=True)
class Last(Rule):
    """Attention from the last query, summed over the heads of the layer.

    Parameters
    ----------
    pooling
        Neighbours in the text that are averaged over, the token itself the middle one; odd.
        TOVA has 1.

    Raises
    ------
    InputError
        If it is something else.
    """

    pooling: int = 1
    asks: ClassVar[Asked] = Asked("sum", 1)

    def __post_init__(self) -> None:
        check_whole("pooling", self.pooling, odd=True)

    def score(self, tokens: Candidates) -> Tensor:
        """What it receives in all heads that still have it; nothing of before."""
        assert isinstance(tokens.received, Tensor)
        together = tokens.by_position(tokens.received).sum(dim=1, keepdim=True)
        return tokens.at(pooled(together, self.pooling))
