"""What a checkpoint must be before its weights are believed.

Its files were made elsewhere: they can be cut off, pointers to what was never fetched, of another
model, or malicious. transformers meets them with exceptions of every kind, or goes on with random
weights. Here whatever is wrong with them is an InputError of one line that says where.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from keyformer.config import InputError
from keyformer.gguf import is_gguf, read_gguf_settings

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
HUB = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder"),
    "token",
)
"""Arguments of ``from_pretrained`` that say where files are."""

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
LFS_POINTER = b"version https://git-lfs"

NOT_THE_FILES_FAULT = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
BARE = (LookupError, TypeError, AttributeError, ArithmeticError)
"""Exceptions whose text says little without their name."""

LONGEST_REASON = 400
SHOWN = 3

SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "num_kv_heads", "intermediate_size", "ffn_hidden_size", "n_inner"),
    *("max_position_embeddings", "max_seq_len", "rotary_dim"),
)
EPSILONS = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps", "norm_epsilon", "norm_eps")

COUNTS = ("max_length", "max_new_tokens", "num_beams", "num_return_sequences")
WHOLE = ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size")
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
FLAGS = ("do_sample", "use_cache")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")


@contextmanager
def reading(
    path: str | Path,
    what: str,
    files: Sequence[str] = (),
    caller: Collection[str] = (),
    warns: bool = True,
) -> Iterator[None]:
    """Within, whatever is raised is the checkpoint's fault, and becomes an InputError.

    Warnings are held back until reading has succeeded; transformers' progress bars are shown in a
    terminal only, not in a log file.

    Parameters
    ----------
    path
        The checkpoint.
    what
        What is being read of it, for the message.
    files
        Patterns of the files that are read: the first broken one of a folder is named.
    caller
        Names of arguments that the caller passed through: an error about one is theirs.
    warns
        False drops warnings on success too.

    Raises
    ------
    InputError
        In one line. Memory that ran out, and errors of the device, are raised as they are.
    """
    failed = f"cannot load a model from {path}: "
    with _quiet(warns):
        try:
            yield
        except NOT_THE_FILES_FAULT:
            raise
        except InputError as error:
            raise InputError(failed + _one_line(error)) from error
        except Exception as error:
            if any(f"unexpected keyword argument {name!r}" in str(error) for name in caller):
                raise
            reason = _broken(Path(path), files) or f"{what}: {_one_line(error)}"
            raise InputError(failed + reason) from error


@contextmanager
def _quiet(warns: bool) -> Iterator[None]:
    """Hold back what transformers and torch warn of in this thread; drop it on an error.

    Where it ``warns`` not, it is dropped in any case.
    """
    held: list[tuple[logging.Handler, logging.LogRecord]] = []
    thread = threading.get_ident()

    def passes(handler: logging.Handler, record: logging.LogRecord) -> bool:
        if record.thread != thread:
            return True
        held.append((handler, record))
        return False

    filters = {
        handler: partial(passes, handler) for handler in logging.getLogger("transformers").handlers
    }
    for handler, keep in filters.items():
        handler.addFilter(keep)
    hides_bar = is_progress_bar_enabled() and not sys.stderr.isatty()
    if hides_bar:
        disable_progress_bar()
    # What Python warns of can be caught in one thread only: catching is global.
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with warnings.catch_warnings(record=True) if is_main else nullcontext([]) as warned:
            yield
    finally:
        for handler, keep in filters.items():
            handler.removeFilter(keep)
        if hides_bar:
            enable_progress_bar()
    if not warns:
        return
    for handler, record in held:
        handler.handle(record)
    for warning in warned or ():
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _one_line(error: BaseException) -> str:
    """What an error says, cut where it goes on and on."""
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    text = " ".join(printable.split())
    if isinstance(error, BARE) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _broken(path: Path, patterns: Sequence[str]) -> str | None:
    """Which of a folder's files, or the one that is no folder, cannot be read, and why; or None."""
    found = [path] if path.is_file() else [f for p in patterns for f in path.glob(p)]
    for file in sorted(found):
        try:
            _try_to_read(file)
        except InputError as error:
            return _one_line(error)
        except Exception as error:
            return f"{file.name} cannot be read: {_one_line(error)}"
    return None


def _check_fetched(file: Path) -> None:
    with file.open("rb") as content:
        beginning = content.read(len(LFS_POINTER))
    if not beginning:
        raise InputError(f"{file.name} is empty")
    if beginning == LFS_POINTER:
        raise InputError(f"{file.name} is a Git LFS pointer, not the file: run `git lfs pull`")


def _try_to_read(file: Path) -> None:
    _check_fetched(file)
    if file.suffix == ".json":
        read_object(file)
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    elif file.suffix == ".gguf":
        from gguf import GGUFReader

        try:
            GGUFReader(file)
        except Exception as error:  # of numpy, about shapes
            raise InputError(f"{file.name} is cut off or no GGUF file") from error
    elif file.suffix == ".bin":
        try:
            held = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # which tells how to run the code in a pickle
            raise InputError(f"{file.name} is cut off or no file of tensors") from error
        if not (isinstance(held, dict) and all(isinstance(t, Tensor) for t in held.values())):
            raise InputError(f"{file.name} does not hold tensors by name")


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises
    ------
    InputError
        If the file holds something else.
    """
    file = Path(path)
    _check_fetched(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.name} is not JSON: {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file.name} must hold a JSON object, got {json.dumps(found)[:40]}")
    return found


def read_settings(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint's config.json, or what a .gguf file has in its place.

    Raises
    ------
    InputError
        If it has none, or not of a model.
    OSError
        If there is no such checkpoint.
    """
    if is_gguf(path):
        return read_gguf_settings(path)
    file = cached_file(path, CONFIG, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise InputError(f"there is no {CONFIG}")
    settings = read_object(file)
    if not isinstance(settings.get("model_type", ""), str):
        raise InputError(f"{CONFIG}: model_type must be a name, got {settings['model_type']!r}")
    return settings


def read_shards(index: str | Path) -> set[str]:
    """The names of the files that an index of shards refers to.

    Raises
    ------
    InputError
        If it is no such index, or a name leads out of the index's folder.
    """
    name = Path(index).name
    files = read_object(index).get("weight_map")
    if not (isinstance(files, dict) and files):
        raise InputError(f"{name}: weight_map must be an object of tensors and files, got {files}")
    for file in files.values():
        place = PureWindowsPath(file) if isinstance(file, str) else None  # of both separators
        if place is None or not place.parts or place.anchor or ".." in place.parts:
            raise InputError(f"{name}: a file must be one in the same folder, got {file!r}")
    return set(files.values())


def check_shards(folder: Path) -> None:
    """Refuse a folder that refers to files outside of it, before any is read.

    Names on the hub are checked by its client.

    Raises
    ------
    InputError
        Naming the file.
    """
    for index in sorted(folder.glob("*.index*.json")):
        read_shards(index)
        if not isinstance(read_object(index).get("metadata"), dict):
            raise InputError(f"{index.name} has no metadata")


def check_fields(settings: dict[str, Any], served: Mapping[str, Sequence[Any]]) -> None:
    """Refuse values that transformers would read and not act upon.

    Parameters
    ----------
    settings
        The fields of config.json.
    served
        By field, the values under which the model is computed as it was trained; a dot leads
        into an object. A field that is not there is as it should be.

    Raises
    ------
    InputError
        Naming the field, its value and what is allowed.
    """
    for field, allowed in served.items():
        *path, name = field.split(".")
        within: Any = settings
        for part in path:
            within = within.get(part) or {}
            if not isinstance(within, dict):
                raise InputError(f"{CONFIG}: {part} must be an object, got {within!r}")
        if within.get(name, allowed[0]) not in allowed:
            raise InputError(f"{CONFIG}: {field} must be {_either(allowed)}, got {within[name]!r}")


def _either(allowed: Iterable[Any]) -> str:
    return " or ".join(json.dumps(value) for value in allowed)


def check_sizes(config: PreTrainedConfig) -> None:
    """Refuse sizes that no model has: zero, below, or of parts that do not make the whole.

    Raises
    ------
    InputError
        Naming the field and its value.
    """

    def called(name: str) -> str:
        return f"{CONFIG}: {config.attribute_map.get(name, name)}"

    found = {name: getattr(config, name, None) for name in SIZES}
    sizes = {name: size for name, size in found.items() if isinstance(size, int)}
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{called(name)} must be at least 1, got {size}")
    for name in EPSILONS:
        if not (getattr(config, name, None) or 0) >= 0:
            raise InputError(f"{called(name)} must be at least 0, got {getattr(config, name)}")
    if not {"hidden_size", "num_attention_heads"} <= sizes.keys():
        return
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if "head_dim" not in sizes and width % heads:
        raise InputError(f"{called('num_attention_heads')} must divide {width}, got {heads}")
    for name in ("num_key_value_heads", "num_kv_heads"):
        if heads % sizes.get(name, 1):
            raise InputError(f"{called(name)} must divide {heads}, got {sizes[name]}")
    turning, most = sizes.get("rotary_dim", 0), sizes.get("head_dim", width // heads)
    if turning > most or turning % 2:
        raise InputError(f"{called('rotary_dim')} must be even and at most {most}, got {turning}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """Refuse a tokenizer without tokens, or with some that the model has no embedding of.

    Special tokens that have been added for other models of the family, such as an image's, may
    lie beyond.

    Parameters
    ----------
    rows
        Of the model's table of embeddings.
    folder
        Where its files are, if they are in a folder.

    Raises
    ------
    InputError
        Naming the file or the token.
    """
    for name in tokenizer.vocab_files_names.values():
        if (folder / name).is_file():
            _check_fetched(folder / name)
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        names = ", ".join(dict.fromkeys(tokenizer.vocab_files_names.values()))
        raise InputError(f"the tokenizer's files are missing (it reads {names})")
    needed = {getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad", "unk")}
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    beyond = {
        number: token
        for token, number in vocabulary.items()
        if number >= rows and (token in needed or token not in added)
    }
    if beyond:
        last = max(beyond)
        raise InputError(
            f"the tokenizer has token {last} ({beyond[last]!r}), and the model's vocab_size is"
            f" {rows}"
        )
    tokenizer("a")  # what its settings say of lengths, sides and special tokens can be used


def check_generation(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, rows: int, **hub: Any
) -> None:
    """Refuse a generation_config.json that cannot be read or used; transformers would do without.

    Parameters
    ----------
    tokenizer
        The checkpoint's.
    rows
        Of the model's table of embeddings.
    hub
        Arguments of ``from_pretrained`` that say where files are.

    Raises
    ------
    InputError
        Naming the field, its value and what is allowed.
    """
    if is_gguf(path):  # which holds none
        return
    file = cached_file(path, GENERATION, _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        return
    settings = read_object(file)
    for names, allowed, fits in (
        (COUNTS, "a whole number, at least 1", lambda value: _is_whole(value) and value >= 1),
        (WHOLE, "a whole number", _is_whole),
        (NUMBERS, "a number, at least 0", _is_amount),
        (FLAGS, "true or false", lambda value: isinstance(value, bool)),
        (TOKENS, "a token's number or a list of them", _are_tokens),
    ):
        for name in names:
            value = settings.get(name)
            if value is not None and not fits(value):
                raise InputError(f"{GENERATION}: {name} must be {allowed}, got {value!r}")
    if (error := _error_of_generate(settings, tokenizer, rows)) is None:
        return
    for name, value in settings.items():
        others = {other: settings[other] for other in settings if other != name}
        if _error_of_generate(others, tokenizer, rows) is None:
            raise InputError(f"{GENERATION}: {name} {json.dumps(value)}: {_one_line(error)}")
    raise error


def _error_of_generate(
    settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int
) -> Exception | None:
    """What transformers' generate raises under these settings, of a model of next to no size."""
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 1}
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    asked = {"use_cache": True, "cache_implementation": None, "max_new_tokens": 2}
    try:
        with torch.random.fork_rng(devices=[]):
            config = LlamaConfig(vocab_size=rows, num_hidden_layers=1, **sizes)
            model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
            model.generation_config = GenerationConfig.from_dict(settings)
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), tokenizer=tokenizer, **asked
            )
    except NOT_THE_FILES_FAULT:
        raise
    except Exception as error:
        return error
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_amount(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and value >= 0


def _are_tokens(value: Any) -> bool:
    return all(map(_is_whole, value)) if isinstance(value, list) else _is_whole(value)


def check_weights(model: PreTrainedModel, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model that is not the one in its files.

    Parameters
    ----------
    report
        What ``from_pretrained`` gives with ``output_loading_info``, where tensors that are tied
        to others or known to be left over from old versions do not appear.

    Raises
    ------
    InputError
        Naming tensors that are missing, that the model has no place for, that have another
        shape, or that are not finite.
    """
    shapes = [
        f"{name} is {tuple(found)} and should be {tuple(wanted)}"
        for name, found, wanted in report["mismatched_keys"]
    ]
    faults = (
        ("tensors are missing", report["missing_keys"]),
        ("tensors are not of this model", report["unexpected_keys"]),
        ("tensors have another shape", shapes),
    )
    if any(names for _, names in faults):
        found = (f"{what} ({_some(names)})" for what, names in faults if names)
        raise InputError(f"the weights do not fit {CONFIG}: {'; '.join(found)}")
    if unusable := [name for name, t in model.state_dict().items() if not _is_finite(t)]:
        raise InputError(f"the weights are NaN or infinite in {_some(unusable)}")


def _some(names: Collection[str]) -> str:
    """The first few names, and how many there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(sorted(names)[:SHOWN])}{more}"


def _is_finite(tensor: Any) -> bool:
    """Whether all of a tensor is finite; one that lies on disk is not looked at.

    Of a tensor that torchao quantized, its scales are; bitsandbytes' scales are tensors of the
    state dict, beside the weights.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return all(_is_finite(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return True
    if tensor.is_meta or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8, of which torch computes little
        tensor = tensor.to(torch.bfloat16)
    # One pass without a copy: NaN is passed on, and infinity is an extreme.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
