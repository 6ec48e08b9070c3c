"""What a rule is: the score of each token, from what it asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from keyformer.errors import InputError

if TYPE_CHECKING:
    from keyformer.config import KeyformerConfig

KINDS = ("sum", "largest")


@dataclass(frozen=True)
class Asked:
    """What a rule wants to know of the attention that tokens receive.

    Attention is f of Eq. 9: with the noise and the temperature of the configuration; for
    ``noise="none"`` and ``tau = 1`` it is the model's own.

    Parameters
    ----------
    kind
        Over the queries of a forward and the query heads that share a key: their "sum", or the
        "largest".
    queries
        Only those of the last so many tokens of a forward; None for all.
    spread
        Of all queries about so many, evenly spaced, the last one of them. Of n queries every s-th
        is asked, s = ceil(n / spread), and counts for the s that it ends. It tells of the tokens
        s - 1 places before it and earlier: of those closer by, some would have been asked by their
        nearest queries and some not. With n up to ``spread`` all are asked of all.

    Raises
    ------
    InputError
        If it can be neither.
    """

    kind: str = "sum"
    queries: int | None = None
    spread: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("queries", "spread"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.spread is not None and (self.kind != "sum" or self.queries is not None):
            raise InputError(f"spread is for the sum over all queries, got {self}")

    @property
    def of_all(self) -> bool:
        """Whether every query is asked."""
        return self.queries is None and self.spread is None

    def steps(self, queries: Tensor) -> Tensor:
        """From one query that is asked to the next, (batch,) of ``queries`` (batch,) int64."""
        if self.spread is None:
            return torch.ones_like(queries)
        return (-(-queries // self.spread)).clamp(min=1)

    def merge(self, total: Tensor, more: Tensor) -> None:
        """Take what further queries gave into ``total``, in place."""
        if self.kind == "sum":
            total += more
        else:
            torch.maximum(total, more, out=total)


@dataclass
class Candidates:
    """The tokens of a layer that compete for its slots after a forward: who is there, then the new.

    One rule serves all layers and caches, so it keeps nothing; tensors are of this forward alone,
    and of other rules too, so it changes none in place.

    Attributes
    ----------
    positions
        (batch, kv_heads, tokens) int64, the position in the text; negative where there is no
        token, or one that the attention mask hides.
    before
        The same shape, float32: the scores that this rule gave after the last forward, times
        ``forgetting`` for each query since; 0 for new tokens.
    received
        The same shape, float32: the attention that the rule asked for; a tuple of such if it asked
        for several, None if for none.
    queries
        (batch,) int64: new tokens, which are the queries of this forward.
    seen
        (batch,) int64: tokens of the text so far.
    length
        No position is as large; the same for the whole batch.
    config
        The settings of the method.
    """

    positions: Tensor
    before: Tensor
    received: Tensor | tuple[Tensor, ...] | None
    queries: Tensor
    seen: Tensor
    length: int
    config: KeyformerConfig
    read: Callable[[], tuple[Tensor, Tensor]]
    """Gives :attr:`keys` and :attr:`values`, which not every rule looks at."""

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        return self.read()

    @cached_property
    def keys(self) -> Tensor:
        """(batch, kv_heads, tokens, head_dim) float32, as attention reads them: rotated, too."""
        return self._vectors[0].float()

    @cached_property
    def values(self) -> Tensor:
        """(batch, kv_heads, tokens, head_dim) float32."""
        return self._vectors[1].float()

    @property
    def there(self) -> Tensor:
        """Where there is a token, (batch, kv_heads, tokens) bool."""
        return self.positions >= 0

    def by_position(self, numbers: Tensor) -> Tensor:
        """Numbers of tokens (batch, kv_heads, tokens) in the order of the text.

        Returns
        -------
        Tensor
            (batch, kv_heads, length): neighbours in the text side by side, 0 where a head has no
            token.
        """
        nowhere = self.positions.masked_fill(~self.there, self.length)
        ordered = numbers.new_zeros(*numbers.shape[:2], self.length + 1)
        return ordered.scatter_(-1, nowhere, numbers)[..., :-1]

    def at(self, ordered: Tensor) -> Tensor:
        """The inverse of :meth:`by_position`; heads may be 1, the same for all."""
        ordered = ordered.expand(-1, self.positions.shape[1], -1)
        return ordered.gather(-1, self.positions.clamp(min=0)).masked_fill(~self.there, 0)


class Rule(ABC):
    """What a token is worth to its key/value head. The least worth leave.

    A rule is asked after each forward: a prompt, a part of one, a decode step. Whether a token is
    of the recent window or a sink, which stay, is not its business.

    Attributes
    ----------
    asks
        What it wants to know of attention, or a tuple of such; None if nothing.
    accumulates
        Whether it asks for the sum first, and in a step of one token adds that to the score: then
        the decode kernels take the step. Subclasses, which may do otherwise, say so anew.
    """

    asks: ClassVar[Asked | tuple[Asked, ...] | None] = None
    accumulates: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "accumulates" not in vars(cls):
            cls.accumulates = False

    @property
    def asked(self) -> tuple[Asked, ...]:
        """All that it wants to know of attention."""
        asks = self.asks
        return asks if isinstance(asks, tuple) else () if asks is None else (asks,)

    @abstractmethod
    def score(self, tokens: Candidates) -> Tensor:
        """The worth of each token, (batch, kv_heads, tokens), a real dtype; NaN is the least.

        What is given for a place without a token does not matter. It is kept in float32, and
        comes back as ``tokens.before`` after the next forward.
        """


def checked(rule: Rule, tokens: Candidates) -> Tensor:
    """What a rule gives, float32.

    Raises
    ------
    InputError
        If it is not a number for each token.
    """
    score = rule.score(tokens)
    wanted = tuple(tokens.positions.shape)
    if not isinstance(score, Tensor) or score.shape != wanted or score.is_complex():
        is_tensor = isinstance(score, Tensor)
        got = f"{tuple(score.shape)} {score.dtype}" if is_tensor else type(score).__name__
        raise InputError(f"rule {rule} must give a tensor {wanted} of scores, got {got}")
    return score.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def pooled(ordered: Tensor, width: int) -> Tensor:
    """The mean over each number's ``width`` neighbours, itself the middle one; 0 beyond the ends.

    Parameters
    ----------
    ordered
        (batch, heads, length).
    """
    if width == 1:
        return ordered
    return torch.nn.functional.avg_pool1d(ordered, width, stride=1, padding=width // 2)


def remembered(tokens: Candidates, queries: int) -> Tensor:
    """What is left of the scores before, where about the last ``queries`` queries count."""
    new = tokens.queries[:, None, None]
    part = (1 - 1 / queries) ** new.float()
    return tokens.before * part.masked_fill(new >= queries, 0)


def is_number(value: Any) -> bool:
    """Whether it is one, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_whole(name: str, value: Any, *, odd: bool = False) -> None:
    """Refuse what is no whole number >= 1, or, if it is to be ``odd``, is even.

    Raises
    ------
    InputError
        Naming it.
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not fits or (odd and value % 2 == 0):
        kind = "an odd number" if odd else "a whole number"
        raise InputError(f"{name} must be {kind} >= 1, got {value!r}")
