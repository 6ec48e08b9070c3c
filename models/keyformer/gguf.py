"""Reading a .gguf file, llama.cpp's format: config, tokenizer and weights in one file."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from keyformer.config import InputError


def is_gguf(path: str | Path) -> bool:
    """Whether a path names such a file; there need not be one."""
    return Path(path).suffix == ".gguf"


def check_gguf_package() -> None:
    """Refuse to go on without the package that reads the format.

    Raises
    ------
    InputError
        Saying what to install.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            'a .gguf file needs gguf, which is not installed: pip install "gguf", or install this'
            ' repository with its extra "smollm2"'
        )


def read_gguf_settings(path: str | Path) -> dict[str, Any]:
    """What a checkpoint's config.json would hold.

    Raises
    ------
    InputError
        If there is no such file or the gguf package is not installed.
    """
    check_gguf_package()
    if not Path(path).is_file():
        raise InputError("there is no such file")
    with checkpoint_folder(path) as folder:
        return AutoConfig.from_pretrained(folder, **gguf_file(path)).to_dict()


@contextmanager
def checkpoint_folder(path: str | Path) -> Iterator[str | Path]:
    """What ``from_pretrained`` takes first: the path, or a folder with a link to a .gguf file.

    The file's own folder may hold a tokenizer.json, whosever that is, which would be read instead.
    """
    if not is_gguf(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, Path(path).name).symlink_to(Path(path).resolve())
        yield folder


def gguf_file(path: str | Path) -> dict[str, Any]:
    """What ``from_pretrained`` takes beside the folder; nothing unless it is a .gguf file."""
    return {"gguf_file": Path(path).name} if is_gguf(path) else {}


def unpacking(path: str | Path) -> dict[str, Any]:
    """:func:`gguf_file` for a model, whose weights, quantized or not, are to be unpacked."""
    options = gguf_file(path)
    if options and hasattr(transformers, "GgufConfig"):  # older versions can do nothing else
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def forget_gguf(model: PreTrainedModel) -> None:
    """Make a model whose weights were unpacked one like any other, which can be saved."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
