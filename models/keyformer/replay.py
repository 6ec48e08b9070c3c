"""The decode step of a generation, captured once as a CUDA graph and replayed.

A step with fixed slots is the same kernels on the same addresses each time, so launching
them one by one, which takes longer than running them, is needed only once.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.utils import ModelOutput

from keyformer.cache import KeyformerCache

CAPTURED_ON = ("cuda",)
"""Devices that have graphs."""

LEAST_STEPS = 8
"""Steps left from which on a capture, which takes as long as a few steps, is worth it."""

INPUTS = ("input_ids", "attention_mask", "position_ids")
IGNORED = ("past_key_values", "use_cache", "return_dict", "logits_to_keep")
"""What else ``generate`` passes, and a step of one token does not depend on."""


def replayed(model: nn.Module, arguments: dict[str, Any]) -> ModelOutput | None:
    """What a forward with these arguments returns, replayed; None where it is to be run.

    Replayed are the steps of ``generate`` with a KeyformerCache whose slots the decode kernels
    write, without gradients, hooks or outputs other than logits. The first step runs, so that
    every kernel is compiled and loaded; the second is captured.
    """
    cache = arguments.get("past_key_values")
    tokens = arguments.get("input_ids")
    if not isinstance(cache, KeyformerCache) or not isinstance(tokens, Tensor):
        return None
    if tokens.device.type not in CAPTURED_ON:
        return None
    if not cache.replays or tokens.shape[1] != 1 or torch.is_grad_enabled():
        return None
    if cache.text.length >= cache.text.reserved or cache.observer is not None:
        return None
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    if given.difference(INPUTS, IGNORED) or not arguments.get("return_dict", True):
        return None
    inputs = {name: arguments[name][:, -1:] for name in INPUTS if name in given}
    graph = cache.graph
    if graph is None or not graph.fits(model, cache, inputs):
        if cache.text.reserved - cache.text.length < LEAST_STEPS:
            return None
        if cache.text.step == 0:
            with FewRows():
                return nn.Module.__call__(model, **arguments)
        cache.graph = graph = _captured(model, cache, inputs)
        if graph is None:
            return None
    else:
        cache.count_step()
    return graph.replay(cache, inputs)


def _captured(
    model: nn.Module, cache: KeyformerCache, inputs: dict[str, Tensor]
) -> DecodeGraph | None:
    """The step as a graph; None, with a warning once, if the model cannot be captured."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    devices = {parameter.device for parameter in model.parameters()}
    if hooked or devices != {inputs["input_ids"].device}:
        cache.replays = False
        return None
    before = [(text.length, text.step) for text in cache.texts]
    try:
        return DecodeGraph(model, cache, inputs)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"decode steps are run, not replayed: {reason}", stacklevel=2)
        cache.replays = False
        for text, (length, step) in zip(cache.texts, before, strict=True):
            text.length, text.step = length, step
        for layer in cache.layers:
            layer.length = layer.text.length
        return None


class DecodeGraph:
    """A captured forward of one new token a sequence.

    It belongs to the cache whose slots it reads and writes, and is freed with it.
    """

    def __init__(self, model: nn.Module, cache: KeyformerCache, inputs: dict[str, Tensor]) -> None:
        self.model = weakref.ref(model)
        self.addresses = _addresses(cache)
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"), FewRows():
            output = model.forward(**self.inputs, past_key_values=cache, return_dict=True)
        if not {"logits"} <= set(output) <= {"logits", "past_key_values"}:
            raise RuntimeError(f"the model returns {', '.join(output)}")
        self.output_type = type(output)
        self.logits = output.logits

    def fits(self, model: nn.Module, cache: KeyformerCache, inputs: dict[str, Tensor]) -> bool:
        """Whether this is that forward: the same model, slots and inputs of the same shapes."""
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        return (
            self.model() is model
            and self.addresses == _addresses(cache)
            and shapes == {name: tensor.shape for name, tensor in self.inputs.items()}
        )

    def replay(self, cache: KeyformerCache, inputs: dict[str, Tensor]) -> ModelOutput:
        """The forward's output for new inputs; the cache has counted them already."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        cache.set_temperature()
        self.graph.replay()
        return self.output_type(logits=self.logits.clone(), past_key_values=cache)


class FewRows(TorchFunctionMode):
    """Takes layer norms by the kernel that is made for the few rows of a decode step.

    A sum that a layer norm follows at once, as that of a residual connection, is left to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sum: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The result of a function that a model calls while the step is captured."""
        kwargs = kwargs or {}
        if function is functional.layer_norm:
            from keyformer.kernels import norm

            terms = None
            if self.sum is not None and args and args[0] is self.sum[2]:
                terms, self.sum = self.sum[:2], None
            self._add()
            return norm.layer_norm(*args, terms=terms, **kwargs)
        self._add()
        if function in SUMS and len(args) == 2 and not kwargs and _alike(*args):
            self.sum = (*args, torch.empty_like(args[0]))
            return self.sum[2]
        return function(*args, **kwargs)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._add()

    def _add(self) -> None:
        """The sum that was put off, if there is one."""
        if self.sum is not None:
            one, other, total = self.sum
            self.sum = None
            torch.add(one, other, out=total)


SUMS = (torch.Tensor.__add__, torch.Tensor.add, torch.add)


def _alike(one: Any, other: Any) -> bool:
    """Whether both are contiguous tensors of one shape and floating dtype."""
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.shape == other.shape
        and one.dtype == other.dtype
        and one.is_floating_point()
        and one.is_contiguous()
        and other.is_contiguous()
    )


def _addresses(cache: KeyformerCache) -> list[int]:
    """Where the slots of each layer are."""
    return [layer.keys.data_ptr() for layer in cache.layers]
