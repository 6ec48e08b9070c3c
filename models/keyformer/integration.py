"""Loading a checkpoint with an evicting cache, or giving one to a loaded model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from keyformer.cache import KeyformerCache
from keyformer.checkpoint import (
    CONFIG,
    GENERATION,
    HUB,
    TOKENIZER,
    WEIGHTS,
    check_generation,
    check_shards,
    check_sizes,
    check_tokenizer,
    check_weights,
    read_settings,
    reading,
)
from keyformer.compat import (
    KeyformerGenerationMixin,
    of_subclass,
    patch,
    switch_attention,
    switch_back,
    turn_cache_on,
    unpatch,
)
from keyformer.config import InputError, KeyformerConfig
from keyformer.gguf import checkpoint_folder, forget_gguf, gguf_file, is_gguf, unpacking
from keyformer.interface import make_patches
from keyformer.quantize import quantization_config, quantize_transposed
from keyformer.served import (
    PACKAGES,
    TESTED,
    check_adapter,
    check_config,
    check_model,
    check_outputs,
    try_out,
)

Model = TypeVar("Model", bound=nn.Module)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path,
    config: KeyformerConfig | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
    use_fast_tokenizer: bool = True,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint in its original format, its attention replaced by an evicting one.

    Parameters
    ----------
    path
        A checkpoint folder (config.json and .safetensors or .bin weights, in one file or
        several shards), a .gguf file (weights are unpacked, the tokenizer is the file's) or a
        name on the Hugging Face hub, of any model that :func:`enable_keyformer` takes. No
        remote code is run.
    config
        Method and settings that ``generate`` uses; the defaults of KeyformerConfig if None.
    dtype
        "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.
    device
        Where to put the model; None takes a GPU if there is one.
    device_map
        Instead of ``device``: spread the layers, as accelerate does ("auto").
    quantize
        Quantize the weights as they are loaded: "bnb-8bit", "bnb-4bit" or "int8", see
        :func:`keyformer.quantize.quantization_config`.
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
        If the path has no usable checkpoint (a file is missing or broken, a setting is not
        supported, weights are missing, too many or not finite: the message says which), dtype,
        device or quantize is unknown, or the package that quantizes, or reads a .gguf file,
        is not installed.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    if device_map is None:
        device_map = {"": check_device(device)}
    with reading(path, CONFIG):
        settings = read_settings(path)
    package = _package(settings.get("model_type"))
    model_class = package.MODEL if package else AutoModelForCausalLM
    with reading(path, CONFIG):
        if package:
            model_config = package.make_config(settings)
        elif is_gguf(path):
            model_config = AutoConfig.for_model(**settings)
        else:
            model_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_sizes(model_config)
        check_config(model_config)
    if quantize is not None:
        if is_gguf(path):
            raise InputError(f"quantize must be None for a .gguf file, got {quantize!r}")
        compute_in: Any = dtype if dtype != "auto" else model_config.dtype or torch.float32
        kwargs["quantization_config"] = quantization_config(quantize, compute_in)
    with reading(path, "the tokenizer", TOKENIZER), checkpoint_folder(path) as folder:
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            config=model_config,
            use_fast=use_fast_tokenizer,
            padding_side="left",
            trust_remote_code=False,
            **gguf_file(path),
        )
        check_tokenizer(tokenizer, model_config.vocab_size, Path(path))
    where = {name: kwargs[name] for name in HUB if name in kwargs}
    with reading(path, GENERATION, warns=False):
        check_generation(path, tokenizer, model_config.vocab_size, **where)
    kwargs = unpacking(path) | kwargs
    files = reading(path, "the weights", WEIGHTS, caller=kwargs)
    with files, checkpoint_folder(path) as folder:
        check_shards(Path(path, kwargs.get("subfolder") or ""))
        options = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = model_class.from_pretrained(
            folder,
            config=model_config,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=False,
            **options,
        )
        check_weights(model, report)
    if is_gguf(path):
        forget_gguf(model)
    if quantize is not None:
        quantize_transposed(model, quantize)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return enable_keyformer(model, config).eval(), tokenizer


def enable_keyformer(model: Model, config: KeyformerConfig | None = None) -> Model:
    """Make a loaded model evict; on one that does already, set another method.

    The model is changed in place and returned: some of its modules get a subclass of their
    class, its attention layers another function to call. Weights stay as they are, and
    :func:`disable_keyformer` takes everything back. Where ``generation_config.use_cache`` is off,
    as in MPT's checkpoints, it is turned on; set it afterwards to generate without a cache.

    Parameters
    ----------
    model
        A causal language model of transformers, or one in PEFT's wrapper.
    config
        Method and settings that ``generate`` uses; the defaults of KeyformerConfig if None.

    Raises
    ------
    InputError
        If the model cannot be served; the message says why.
    """
    check_adapter(model)
    inner = _unwrapped(model)
    if not _evicts(inner):
        _make_evict(inner)
    if "keyformer_config" not in vars(inner.get_decoder()):  # the first time
        turn_cache_on(inner)
    inner.get_decoder().keyformer_config = config or KeyformerConfig()
    return model


def _make_evict(model: PreTrainedModel) -> None:
    """Patch a model, or leave it as it is where it cannot be served."""
    kind = model.config.model_type
    if package := _package(kind):
        check_config(model.config)
        patches = package.PATCHES | of_subclass(type(model), package.PATCHES)
        if not issubclass(patches.get(type(model), nn.Module), KeyformerGenerationMixin):
            raise InputError(f"a {type(model).__name__} does not generate text")
        patch(model, patches | of_subclass(type(model.get_decoder()), patches))
        return
    layers, config = check_model(model), model.config
    is_tried = kind not in TESTED and model.device.type != "meta"
    expected = try_out(model, lambda: DynamicCache(config=config)) if is_tried else None
    patch(model, make_patches(model))
    switch_attention(model, layers)
    if expected is None:
        return
    try:
        full = KeyformerConfig.preset("full")
        check_outputs(model, expected, try_out(model, lambda: KeyformerCache(config, full)))
    except InputError:
        disable_keyformer(model)
        raise


def disable_keyformer(model: Model) -> Model:
    """Undo :func:`enable_keyformer`: the model is transformers' own again, as it was before.

    The model is changed in place and returned. One that does not evict stays as it is.
    """
    inner = _unwrapped(model)
    if not _evicts(inner):
        return model
    vars(inner.get_decoder()).pop("keyformer_config", None)
    if vars(inner).pop("keyformer_turned_cache_on", False):
        inner.generation_config.use_cache = False
    unpatch(inner)
    switch_back(inner)
    return model


def _evicts(model: Any) -> bool:
    return isinstance(model, KeyformerGenerationMixin)


def _unwrapped(model: Any) -> Any:
    """transformers' model inside PEFT's wrapper, or the model itself.

    Raises
    ------
    InputError
        If there is none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"a {type(inner).__name__} is not a model of transformers")
    return inner


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
    """The package of models of that type, None if there is none."""
    return importlib.import_module(PACKAGES[model_type]) if model_type in PACKAGES else None
