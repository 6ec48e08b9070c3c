"""Which backend does a piece of work: it is chosen here alone."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from keyformer.attention import Attended, AttentionSpec, Tokens
from keyformer.backends import torch as torch_backend
from keyformer.config import InputError, KeyformerConfig
from keyformer.kernels import DTYPES
from keyformer.rules import formula
from keyformer.score import Scorer
from keyformer.slots import Slots
from keyformer.text import Span

INSTALLED = importlib.util.find_spec("triton") is not None
LARGEST_HEAD = 256
LARGEST_BATCH = 256
"""Rows whose vectors of one slot fit in the registers of a program that reorders them."""


def on_kernels(backend: str, query: Tensor, **others: Any) -> bool:
    """Whether the kernels are to attend with ``query`` (batch, heads, tokens, head_dim).

    Parameters
    ----------
    backend
        That of KeyformerConfig. "auto" takes the kernels on a GPU wherever they can.
    others
        What they do not know, by name; None where it is not asked for.

    Raises
    ------
    InputError
        If it is "triton" and they cannot.
    """
    if backend == "torch" or (backend == "auto" and query.device.type != "cuda"):
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reasons = {
        "the package triton is not installed": not INSTALLED,
        f"the model is on {query.device.type}": query.device.type != "cuda" and not interpreted,
        f"the model's dtype is {query.dtype}": query.dtype not in DTYPES,
        f"a head has {query.shape[-1]} dimensions": query.shape[-1] > LARGEST_HEAD,
        "the kernels have no gradients": torch.is_grad_enabled() and query.requires_grad,
    }
    reasons |= {f"the {name} is {value}": value is not None for name, value in others.items()}
    for reason, holds in reasons.items():
        if holds and backend == "triton":
            raise InputError(f"backend 'triton' cannot be used: {reason}; auto or torch can")
        if holds:
            return False
    return True


def prefill(
    config: KeyformerConfig,
    query: Tensor,
    slots: Tokens,
    new: Tokens,
    spec: AttentionSpec,
    scorer: Scorer | None,
    *,
    span: Span,
    output_weights: bool = False,
    unbroken: bool = False,
    **others: str | None,
) -> Attended:
    """:func:`keyformer.backends.torch.prefill`, by the kernels where they are to run.

    ``span`` is that of the new tokens, which only the kernels ask for; ``others`` is what they do
    not know of the attention mask and of the slots.
    """
    if not output_weights and on_kernels(
        config.backend, query, softcap=spec.softcap, window=spec.window, **others
    ):
        from keyformer.backends import triton

        library = config.backend == "auto" and unbroken and torch_backend.is_plain(slots, spec)
        return triton.prefill(
            query, slots, new, spec, span, scorer, library=library and _has_flash(query)
        )
    return torch_backend.prefill(query, slots, new, spec, scorer, output_weights, unbroken)


def _has_flash(query: Tensor) -> bool:
    """Whether torch's attention needs no more memory than its output: by a flash kernel."""
    half = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    return half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def stepping(
    config: KeyformerConfig, query: Tensor, spec: AttentionSpec, **others: str | None
) -> ModuleType | None:
    """The backend that takes a step of one token whole, with what it does to scores and slots.

    They accumulate: where a rule does otherwise, or several share the slots, it is taken as a
    prompt is, which is said once for each rule where kernels run: their steps cannot be replayed.
    """
    (rule, _), *more = config.rules
    known = not more and (rule.accumulates or not config.needs_scores)
    unknown = {"softcap": spec.softcap, "window": spec.window, **others}
    if on_kernels(config.backend, query, **unknown):
        if not known:
            _say_slow(formula(config.rules))
            return None
        from keyformer.backends import triton

        return triton
    odd = any(value is not None for value in unknown.values())
    learns = torch.is_grad_enabled() and query.requires_grad
    return torch_backend if known and not (odd or learns) else None


@functools.cache
def _say_slow(rule: str) -> None:
    warnings.warn(
        f"the decode kernels do not know the rule {rule}: torch decides who leaves, and steps are"
        " not replayed",
        stacklevel=2,
    )


def reorder(
    config: KeyformerConfig, layers: Sequence[Slots], parents: Tensor, shared: Tensor, **others: Any
) -> None:
    """Give row i of the slots of layers, all of one shape, what row ``parents[i]`` has.

    ``shared`` is that of :class:`keyformer.text.Text`; ``others`` is what kernels do not know.
    """
    scores = layers[0].scores
    fits = len(parents) == len(scores) <= LARGEST_BATCH and scores.ndim == 3
    if fits and on_kernels(config.backend, scores[..., :1], **others):
        from keyformer.backends import triton

        triton.reorder(layers, parents, shared)
    else:
        torch_backend.reorder(layers, parents, shared)
