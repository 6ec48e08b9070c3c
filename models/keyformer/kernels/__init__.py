"""Triton versions of the hot loops, and where they run instead of the torch ones."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from keyformer.attention import Attended, Tokens
from keyformer.attention import attention as torch_attention
from keyformer.config import InputError
from keyformer.text import Span

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 256

COUNTS = 3
"""What the decode kernel's programs count of each head: those done, settlers done, and those that
had their turn."""


def run_on(backend: str, query: Tensor, **others: Any) -> bool:
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


def reorder_on(backend: str, scores: Tensor, parents: Tensor, **others: Any) -> bool:
    """Whether a kernel is to give the slots of rows, with ``scores``, to the beams ``parents``."""
    if len(parents) != len(scores) or not run_on(backend, scores[..., :1], **others):
        return False
    from keyformer.kernels.reorder import LARGEST_BATCH

    return len(scores) <= LARGEST_BATCH


def attention(
    backend: str,
    query: Tensor,
    slots: Tokens,
    new: Tokens,
    *,
    softcap: float | None = None,
    window: int | None = None,
    output_weights: bool = False,
    span: Span | None = None,
    mask: str | None = None,
    **options: Any,
) -> Attended:
    """:func:`keyformer.attention.attention`, by the prefill kernels where they are to run.

    ``span`` is that of the new tokens, which only the kernels ask for; ``mask`` is what they do
    not know of the attention mask.
    """
    others: dict[str, Any] = {"softcap": softcap, "window": window}
    if not output_weights and run_on(backend, query, **others, mask=mask):
        from keyformer.kernels import prefill

        span = span or Span(new.positions[:, 0], new.places[:, 0])
        return prefill.attention(query, slots, new, span, **options)
    return torch_attention(query, slots, new, output_weights=output_weights, **others, **options)
