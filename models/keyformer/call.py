"""The forward call that is running: what its attention layers cannot be handed as arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from keyformer.cache import KeyformerCache


@dataclass(frozen=True)
class Call:
    """A forward of a model through a KeyformerCache.

    Attributes
    ----------
    cache
        The model's ``past_key_values``.
    real
        (batch, tokens) bool: which of the new columns are tokens, False for padding.
    mask
        The same as the layers are given it, (batch, 1, 1, tokens).
    on_one_device
        Whether the whole model is, asked before the first layer of a first prompt.
    output_attentions
        Whether the layers' weights are asked for.
    rotation
        Turns new queries and keys back, where their places change; None elsewhere.
    handed
        By layer, the keys and values that its call to ``update`` was given.
    """

    cache: KeyformerCache
    real: Tensor
    mask: Tensor
    on_one_device: bool = False
    output_attentions: bool = False
    rotation: Any = None
    handed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""In this thread; None outside of such a forward, so also where a layer is run again for its
gradients: there, as without a cache, attention is transformers' own."""

LAST_OUTPUTS: ContextVar[int | None] = ContextVar("last_outputs", default=None)
"""Of how many tokens, counted from the end, the decoder's outputs are of use; None is all."""


@contextmanager
def running(call: Call | None) -> Iterator[None]:
    """Within, that is the forward that is running, whichever has called it: a hook's may."""
    before, last = CALL.set(call), LAST_OUTPUTS.set(None)
    try:
        yield
    finally:
        CALL.reset(before)
        LAST_OUTPUTS.reset(last)
