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
from transformers.utils import ModelOutput

from keyformer.cache import KeyformerCache

CAPTURED_ON = ("cuda",)
"""Devices that have graphs."""

LEAST_STEPS = 8
"""Steps left from which on a capture, which takes as long as a few steps, is worth it."""

INPUTS = ("input_ids", "position_ids")
IGNORED = ("past_key_values", "use_cache", "return_dict", "logits_to_keep", "attention_mask")
"""What else ``generate`` passes, and a step of one token does not depend on: of the mask it is
known before that it shows all that was shown, and the new token."""


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
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in _tensors(cache)):
        return None  # the step copies them
    mask, columns = arguments.get("attention_mask"), cache.columns
    if not columns.ends_real or not columns.continued_by(mask):
        return None
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    if given.difference(INPUTS, IGNORED) or not arguments.get("return_dict", True):
        return None
    if "position_ids" not in given and model.get_decoder().counts_alone(cache):  # type: ignore
        return None
    inputs = {name: arguments[name][:, -1:] for name in INPUTS if name in given}
    graph = cache.graph
    if graph is None or not graph.fits(model, cache, inputs):
        if cache.text.reserved - cache.text.length < LEAST_STEPS:
            return None
        if not _capturable(model, inputs["input_ids"].device):
            cache.replays = False
            return None
        if cache.text.step == 0:
            with _few_rows(model):
                return nn.Module.__call__(model, **arguments)
        cache.graph = graph = _captured(model, cache, inputs)
        if graph is None:
            return None
        columns.mask = mask
    else:
        cache.count_step()
        columns.advance(mask, 1)
    return graph.replay(cache, inputs)


def _captured(
    model: nn.Module, cache: KeyformerCache, inputs: dict[str, Tensor]
) -> DecodeGraph | None:
    """The step as a graph; None, with a warning once, if the model cannot be captured."""
    before = [(text.length, text.step) for text in cache.texts]
    try:
        return DecodeGraph(model, cache, inputs)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"decode steps are run, not replayed: {reason}", stacklevel=2)
        cache.replays = False
        cache.halfway = False
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
        self.hooks = _hooks(model)
        self.state = _state(model)
        self.prompt_end = cache.text.prompt_end
        self.addresses = _addresses(cache)
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.graph = torch.cuda.CUDAGraph()
        # What the graph reads has to live as long as it does.
        self.mask: Any = None
        if cache.columns.mask is not None:
            self.mask = torch.ones_like(inputs["input_ids"])
            self.mask.keyformer_continues = cache.columns.mask
        few_rows = _few_rows(model)  # looks at the model first, which no graph may
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"), few_rows:
            output = model.forward(
                **self.inputs, attention_mask=self.mask, past_key_values=cache, return_dict=True
            )
        if not {"logits"} <= set(output) <= {"logits", "past_key_values"}:
            raise RuntimeError(f"the model returns {', '.join(output)}")
        self.output_type = type(output)
        self.logits = output.logits

    def fits(self, model: nn.Module, cache: KeyformerCache, inputs: dict[str, Tensor]) -> bool:
        """Whether this is that forward: the same slots, inputs of the same shapes, and a model of
        which nothing has changed that it computes with.

        The model is looked through once after each prompt, and its hooks at every step.
        """
        if self.model() is not model or any(self.hooks):
            return False
        if self.prompt_end != cache.text.prompt_end and self.state != _state(model):
            return False
        self.prompt_end = cache.text.prompt_end
        shapes = {name: tensor.shape for name, tensor in inputs.items()}
        return (
            self.state[0] == _modes()
            and self.addresses == _addresses(cache)
            and shapes == {name: tensor.shape for name, tensor in self.inputs.items()}
        )

    def replay(self, cache: KeyformerCache, inputs: dict[str, Tensor]) -> ModelOutput:
        """The forward's output for new inputs; the cache has counted them already."""
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        cache.set_temperature()
        self.graph.replay()
        cache.halfway = False
        return self.output_type(logits=self.logits.clone(), past_key_values=cache)


def _capturable(model: nn.Module, device: torch.device) -> bool:
    """Whether all of a model is on one device, and nothing is called beside it."""
    return not any(_hooks(model)) and {one.device for one in model.parameters()} == {device}


def _few_rows(model: nn.Module) -> Any:
    from keyformer.few_rows import FewRows  # kernels, which not all have

    return FewRows(model)


def _hooks(model: nn.Module) -> list[dict]:
    """Where all hooks are kept that a graph would pass over."""
    everywhere = [nn.modules.module._global_forward_hooks]
    everywhere.append(nn.modules.module._global_forward_pre_hooks)
    for module in model.modules():
        everywhere += [module._forward_hooks, module._forward_pre_hooks]
    return everywhere


def _modes() -> tuple:
    """What of torch's own settings decides how an operation computes."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.is_inference_mode_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
    )


def _state(model: nn.Module) -> tuple:
    """All that a forward depends on beside its inputs: modes, modules, weights, plain settings.

    An adapter that is switched, merged or scaled shows in the settings of its layers.
    """
    settings = []
    for name, module in model.named_modules():
        tensors = (*module._parameters.items(), *module._buffers.items())
        settings.append(
            (
                name,
                type(module),
                tuple((key, t.data_ptr(), t.dtype) for key, t in tensors if t is not None),
                tuple((key, repr(v)) for key, v in vars(module).items() if _is_plain(v)),
            )
        )
    return _modes(), repr(getattr(model, "config", None)), settings


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a name, or a collection of such."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _tensors(cache: KeyformerCache) -> list[Tensor]:
    """All that a step reads and writes; a layer's slots are replaced together."""
    assert cache.sequences is not None
    tensors = [cache.tau, cache.sequences]
    for layer in cache.layers:
        tensors += [layer.keys, layer.scores]
        if layer.own_budget is not None:
            tensors.append(layer.own_budget)
    for text in cache.texts:
        tensors += [text.seen, text.budget, text.window, text.frozen_before]
    return tensors


def _addresses(cache: KeyformerCache) -> list[int]:
    return [tensor.data_ptr() for tensor in _tensors(cache)]
