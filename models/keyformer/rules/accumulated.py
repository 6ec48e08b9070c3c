"""Accumulated attention: Keyformer's score function and, without noise, H2O's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from keyformer.rules.rule import Asked, Candidates, Rule, check_whole


@dataclass(frozen=True)
class Accumulated(Rule):
    """f_theta of section 3.3.2: all attention that a token has received since it came.

    Parameters
    ----------
    spread
        Of a prompt's queries about so many are asked, evenly spaced, so that scores of a long one
        cost as much as those of a short one: see :class:`keyformer.rules.rule.Asked`. None: all,
        as in the paper.

    Raises
    ------
    InputError
        If it is neither None nor a whole number >= 1.
    """

    spread: int | None = None

    accumulates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.spread is not None:
            check_whole("spread", self.spread)

    @property
    def asks(self) -> Asked:  # type: ignore[override]
        """The sum over all queries, or over a part of them that stands for all."""
        return Asked("sum", spread=self.spread)

    def score(self, tokens: Candidates) -> Tensor:
        """What it had, and what it receives."""
        assert isinstance(tokens.received, Tensor)
        return tokens.before + tokens.received
