"""Reading a task's dataset and turning its items into prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from keyformer.config import InputError


@dataclass(frozen=True)
class Task:
    """How the items of a dataset are read.

    Attributes
    ----------
    fields
        The fields every item must have, as strings.
    document
        The field that may not be empty and is cut where a prompt is too long.
    reference
        The field that the generated text is scored against.
    prompt
        Makes the prompt of an item.
    """

    fields: tuple[str, ...]
    document: str
    reference: str
    prompt: Callable[[dict[str, str]], str]


def alpaca_prompt(instruction: str, input: str) -> str:
    """The Alpaca instruction template, which the paper's runs used."""
    return (
        "Below is an instruction that describes a task, paired with an input that provides"
        " further context. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )


TASKS = {
    "summarization": Task(
        fields=("instruction", "input", "output"),
        document="input",
        reference="output",
        prompt=lambda item: alpaca_prompt(item["instruction"], item["input"]),
    )
}


def load_items(path: str | Path, task: Task) -> list[dict[str, str]]:
    """Read a dataset: a JSON list of objects, or one JSON object a line.

    Raises
    ------
    InputError
        If the file is missing, empty or not JSON, or an item lacks a field or has an
        empty document; the message says which item, counted from 0.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the dataset {path}: {error}") from error
    items = _parse(text, path)
    if not items:
        raise InputError(f"the dataset {path} is empty")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise InputError(f"{path}: item {index} is not an object with {_names(task)}")
        for name in task.fields:
            if not isinstance(item.get(name), str):
                what = "is not text" if name in item else "is missing"
                raise InputError(f"{path}: item {index}: field {name!r} {what}")
        if not item[task.document].strip():
            raise InputError(f"{path}: item {index}: field {task.document!r} is empty")
    return items


def _parse(text: str, path: str | Path) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
    items = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} is neither a JSON list nor JSON lines: line {number}: {error}"
                ) from error
    return items


def _names(task: Task) -> str:
    return ", ".join(task.fields)


def sample(items: Sequence[Any], n_obs: int | None, seed: int) -> list[Any]:
    """``n_obs`` items drawn at random without replacement, in their order; None is all.

    Raises
    ------
    InputError
        If there are fewer items than that.
    """
    if n_obs is None:
        return list(items)
    if not 1 <= n_obs <= len(items):
        raise InputError(f"n_obs must be from 1 to {len(items)}, the dataset's size, got {n_obs}")
    drawn = random.Random(seed).sample(range(len(items)), n_obs)
    return [items[index] for index in sorted(drawn)]


def make_prompt(
    item: dict[str, str],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
) -> str:
    """An item's prompt, its document cut so that the prompt has at most ``max_tokens``.

    The instruction and the end of the template are kept whole.

    Raises
    ------
    InputError
        If the template alone is longer than that.
    """

    def tokens(text: str, **options: Any) -> list[int]:
        # Quiet: a tokenizer warns of lengths that are the model's own business.
        return tokenizer(text, verbose=False, **options)["input_ids"]

    prompt = task.prompt(item)
    if max_tokens is None:
        return prompt
    excess = len(tokens(prompt)) - max_tokens
    if excess <= 0:
        return prompt
    document = tokens(item[task.document], add_special_tokens=False)
    while excess > 0:
        # Cutting can change how the seam is tokenized, so look again.
        document = document[: len(document) - excess]
        if not document:
            raise InputError(
                f"max_tokenizer_length {max_tokens} leaves no room for the document:"
                " the prompt's template alone is longer"
            )
        text = tokenizer.decode(document, skip_special_tokens=True)
        prompt = task.prompt({**item, task.document: text})
        excess = len(tokens(prompt)) - max_tokens
    return prompt
