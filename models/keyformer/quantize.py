"""Quantized weights, through bitsandbytes and torchao."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from keyformer import quiet
from keyformer.config import InputError

QUANTIZATIONS = {"bnb-8bit": "bitsandbytes", "bnb-4bit": "bitsandbytes", "int8": "torchao"}
"""Each kind of quantized weights, and the package that does it."""


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config``.

    Parameters
    ----------
    kind
        "bnb-8bit": LLM.int8(), rows of weights and of activations in int8, outliers in half
        precision; "bnb-4bit": NF4 in blocks of 64 weights; "int8": weights alone in int8, a
        scale for each row. Embeddings and the output layer stay as they are.
    dtype
        Of everything that is not quantized.

    Raises
    ------
    InputError
        If the kind is unknown or its package is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise InputError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}")
    package = QUANTIZATIONS[kind]
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f'quantize {kind!r} needs {package}, which is not installed: pip install "{package}",'
            ' or install this repository with its extra "quantize"'
        )
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        quiet.say()
        return TorchAoConfig(Int8WeightOnlyConfig())
    # It says at every product that activations are cast to half precision.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if kind == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quantize_transposed(model: PreTrainedModel, kind: str) -> None:
    """Quantize GPT-2's layers too, which hold their weights transposed and torchao passes over."""
    if kind != "int8":
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Conv1D):
                linear = nn.Linear(module.nx, module.nf, device="meta")
                linear.weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)
                linear.bias = module.bias
                quantize_(linear, Int8WeightOnlyConfig())
                setattr(parent, name, linear)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers really occupy, the scales of quantized ones included."""
    tensors = {id(t): t for module in model.modules() for t in _stored(module)}
    return sum(t.nbytes for t in tensors.values())


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """The plain tensors that a module holds, without those of its children."""
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's: values and scales within
            yield from (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            continue
        yield tensor
        if (state := getattr(tensor, "quant_state", None)) is not None:
            yield from (state.absmax, state.code)
    # bitsandbytes keeps the scales of rows beside the weight until its first use, then here.
    weight, state = getattr(module, "weight", None), getattr(module, "state", None)
    for holder in (weight, state):
        if isinstance(scales := getattr(holder, "SCB", None), Tensor):
            yield scales
