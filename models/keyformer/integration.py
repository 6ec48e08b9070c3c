"""Loading a checkpoint with an evicting cache, or giving one to a loaded model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from keyformer.config import InputError, KeyformerConfig
from keyformer.modeling import KeyformerGenerationMixin, patch

PACKAGES = {"mpt": "mpt_keyformer", "gptj": "gptj_keyformer", "gpt2": "cerebras_keyformer"}
"""For each supported model_type, the package with its MODEL, PATCHES and make_config."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path,
    config: KeyformerConfig | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    use_fast_tokenizer: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint in its original format, its attention replaced by an evicting one.

    Parameters
    ----------
    path
        A checkpoint folder (config.json and .safetensors or .bin weights, in one file or
        several shards) or a name on the Hugging Face hub. No remote code is run.
    config
        Method and settings that ``generate`` uses; the defaults of KeyformerConfig if None.
    dtype
        "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
    device
        Where to put the model; None takes a GPU if there is one.
    device_map
        Instead of ``device``: spread the layers, as accelerate does ("auto").
    use_fast_tokenizer
        False takes the tokenizer's Python implementation where it has one.
    kwargs
        Passed to the model's ``from_pretrained``.

    Returns
    -------
    tuple
        The model in evaluation mode, and its tokenizer, which pads on the left.

    Raises
    ------
    InputError
        If the path has no usable checkpoint, its model_type is not supported, or dtype or
        device is unknown.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    if device_map is None:
        device_map = {"": check_device(device)}
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path)
        if not settings:
            raise InputError("there is no config.json")
        package = _package(settings.get("model_type"))
        model_config = package.make_config(settings)
        model = package.MODEL.from_pretrained(
            path,
            config=model_config,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            **kwargs,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            config=model_config,
            use_fast=use_fast_tokenizer,
            padding_side="left",
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot load a model from {path}: {reason}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return enable_keyformer(model, config).eval(), tokenizer


def enable_keyformer(
    model: PreTrainedModel, config: KeyformerConfig | None = None
) -> PreTrainedModel:
    """Make a loaded model evict; on one that does already, set another method.

    The model is changed in place and returned. Its modules take their patched classes, its
    weights stay.

    Raises
    ------
    InputError
        If the model's type is not supported.
    """
    if not isinstance(model, KeyformerGenerationMixin):
        patches = _package(model.config.model_type).PATCHES
        if not issubclass(patches.get(type(model), nn.Module), KeyformerGenerationMixin):
            raise InputError(f"a {type(model).__name__} does not generate text")
        patch(model, patches)
    model.base_model.keyformer_config = config or KeyformerConfig()
    model.config.use_cache = True  # of forward calls; generate uses one anyway
    return model


def check_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None is a GPU if there is one, else the CPU.

    Raises
    ------
    InputError
        If there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.device_count()}
    if found is None or available.get(found.type, 0) <= (found.index or 0):
        names = ", ".join(name for name, count in available.items() if count)
        raise InputError(f"device {str(device)!r} is not available; this machine has: {names}")
    return found


def _package(model_type: str | None) -> Any:
    if model_type not in PACKAGES:
        raise InputError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(PACKAGES)}"
        )
    return importlib.import_module(PACKAGES[model_type])
