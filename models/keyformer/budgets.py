"""Budgets: how layers and heads share the key slots. The paper gives each of them as many.

The recent window and the sinks are in every head; what is shared out are the K = k - w - sinks
slots for key tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keyformer.errors import InputError


@dataclass(frozen=True)
class Shared:
    """What a layer has to share out when it has read the first prompt.

    Attributes
    ----------
    key_slots
        (batch,) int64: K.
    candidates
        (batch,) int64: tokens of the whole prompt that compete for them, which may be fewer.
    layer, layers
        Which one it is of those that evict by this method, from 0 on.
    order
        (batch, kv_heads, tokens) int64: the order in which tokens leave, the lowest first, across
        heads too; ``SAFE`` where there is no candidate. Of a prompt in chunks those of the first.
    """

    key_slots: Tensor
    candidates: Tensor
    layer: int
    layers: int
    order: Tensor


SAFE = torch.iinfo(torch.int64).min
"""Below every rank: what does not compete."""


class Policy(ABC):
    """Who gets how many of the key slots.

    Attributes
    ----------
    by_head
        Whether heads of a layer may get different numbers.
    """

    by_head = False

    @abstractmethod
    def key_slots(self, shared: Shared) -> Tensor:
        """Of each head in this layer, int64, >= 0; fixed from then on.

        Returns
        -------
        Tensor
            (batch, 1), or (batch, kv_heads) ``by_head``.
        """


@dataclass(frozen=True)
class Pyramid(Policy):
    """PyramidKV's (arXiv 2406.02069): fewer from layer to layer, in all as many as K in each.

    Parameters
    ----------
    beta
        The last layer gets K / beta; at least 1.

    Raises
    ------
    InputError
        If it is something else.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if (
            isinstance(self.beta, bool)
            or not isinstance(self.beta, (int, float))
            or not (1 <= self.beta < math.inf)
        ):
            raise InputError(f"beta must be a finite number >= 1, got {self.beta!r}")

    def key_slots(self, shared: Shared) -> Tensor:
        """A straight line from the first layer, which gets all that it could use at most."""
        mean = shared.key_slots.double()
        first = (2 * mean - mean / self.beta).minimum(shared.candidates.double()).maximum(mean)
        fall = 2 * (first - mean) / max(1, shared.layers - 1)
        if shared.layers == 1:
            first = mean

        def before(layer: int) -> Tensor:
            """Slots of all layers before this one, whole ones."""
            return (layer * first - fall * (layer * (layer - 1) / 2) + 1e-6).floor().long()

        return (before(shared.layer + 1) - before(shared.layer))[:, None]


@dataclass(frozen=True)
class Adaptive(Policy):
    """Ada-KV's (arXiv 2407.11550): heads of a layer compete for the slots of them all.

    By the scores of the first rule, after the first prompt or, where that is read in chunks, its
    first chunk: if all of that fits, every head has as many. A head may get none.

    Parameters
    ----------
    least
        The part of K that every head gets, in [0, 1].

    Raises
    ------
    InputError
        If it is something else.
    """

    least: float = 0.2
    by_head = True

    def __post_init__(self) -> None:
        fits = isinstance(self.least, (int, float)) and not isinstance(self.least, bool)
        if not fits or not 0 <= self.least <= 1:
            raise InputError(f"least must be a part in [0, 1], got {self.least!r}")

    def key_slots(self, shared: Shared) -> Tensor:
        """The best of each head, then the best of all."""
        order, (_, heads, tokens) = shared.order, shared.order.shape
        least = (self.least * shared.key_slots.double() + 1e-9).floor()[:, None, None]
        safe = (from_largest(order) < least) & (order > SAFE)
        order = order.masked_fill(safe, torch.iinfo(torch.int64).max).flatten(1)
        taken = (from_largest(order) < heads * shared.key_slots[:, None]) & (order > SAFE)
        all_fit = (order > SAFE).sum(dim=-1, keepdim=True) <= heads * shared.key_slots[:, None]
        of_heads = taken.unflatten(1, (heads, tokens)).sum(dim=-1)
        return torch.where(all_fit, shared.key_slots[:, None], of_heads)


def from_largest(order: Tensor) -> Tensor:
    """The place of each number in the last dimension, 0 for the largest; of equals the first."""
    sorted_ = order.argsort(dim=-1, descending=True, stable=True)
    counting = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(sorted_).scatter_(-1, sorted_, counting)


POLICIES: dict[str, type[Policy] | None] = {
    "uniform": None,
    "pyramid": Pyramid,
    "adaptive": Adaptive,
}


def policy(given: Any) -> Policy | None:
    """The policy that a configuration names; None where each head has as many slots.

    Raises
    ------
    InputError
        Naming what is none.
    """
    if isinstance(given, Policy):
        return given
    if not isinstance(given, str) or given not in POLICIES:
        names = ", ".join(POLICIES)
        raise InputError(f"budgets must be one of {names}, or a Policy, got {given!r}")
    of = POLICIES[given]
    return None if of is None else of()
