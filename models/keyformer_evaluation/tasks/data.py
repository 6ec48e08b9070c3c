"""Reading a task's dataset and turning its items into prompts."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from keyformer.config import InputError, KeyformerConfig

LOGGER = logging.getLogger(__name__)

Item = dict[str, Any]
Message = dict[str, str]
"""Of a conversation: its ``role``, user or assistant, and its ``content``."""

PROMPTS = ("alpaca", "chat", "none")
"""What a prompt can be: the paper's template, the tokenizer's chat template, the text alone."""

OTHER_NAMES = {"cnn_eval.json": "cnndm_eval.json", "cnndm_eval.json": "cnn_eval.json"}
"""CNN/DailyMail's file, as the authors' repository calls it and as this one does."""


@dataclass(frozen=True)
class Task:
    """How the items of a dataset are read.

    Attributes
    ----------
    texts
        The fields every item must have, as strings.
    lists
        The fields every item must have, as lists of strings, all equally long.
    document
        The field of ``texts`` that may not be empty and is cut where a prompt is too long.
    prompt, message, bare
        Make an item's prompt in the paper's form, what a user would say to a chat model, and the
        text without an instruction.
    reference
        Makes the text that would be its right continuation.
    scored
        The part of a text, generated or reference, that ROUGE looks at.
    max_new_tokens
        How many tokens are generated at most unless the user says otherwise.
    adapt
        Gives an item that comes in another known form the task's fields.
    """

    texts: tuple[str, ...]
    lists: tuple[str, ...]
    document: str
    prompt: Callable[[Item], str]
    message: Callable[[Item], str]
    bare: Callable[[Item], str]
    reference: Callable[[Item], str]
    scored: Callable[[Item, str], str]
    max_new_tokens: int
    adapt: Callable[[Any], Any] = lambda item: item


def alpaca_prompt(instruction: str, input: str) -> str:
    """The Alpaca instruction template, which the paper's runs used."""
    return (
        "Below is an instruction that describes a task, paired with an input that provides"
        " further context. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )


def user(content: str) -> Message:
    """What a user says."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """What a model has said."""
    return {"role": "assistant", "content": content}


def from_article(item: Any) -> Any:
    """An item of articles.json, an article with its summary, in the fields of summarization."""
    if not (isinstance(item, dict) and {"article", "summary"} <= item.keys()):
        return item
    instruction = "Summarize the following article in one sentence."
    fields = {"instruction": instruction, "input": item["article"], "output": item["summary"]}
    return {**fields, **item}


def dialogue_opening(narrative: str, speakers: Sequence[str]) -> str:
    """The situation and the instruction to continue; after it come the turns, one a line."""
    names = " and ".join(dict.fromkeys(speakers))
    return f"{narrative}\n\nContinue the dialogue between {names}.\n\n"


def dialogue_prompt(item: Item) -> str:
    """The opening and the first turn, after which the next speaker's name is expected."""
    return dialogue_opening(item["narrative"], item["speakers"]) + _turns(item, slice(0, 1)) + "\n"


def dialogue_reference(item: Item) -> str:
    """The turns after the first, one a line."""
    return _turns(item, slice(1, None))


def spoken(item: Item, text: str) -> str:
    """The turns of a text without the names before them."""
    names = "|".join(map(re.escape, dict.fromkeys(item["speakers"])))
    return re.sub(rf"^[ \t]*(?:{names}):[ \t]*", "", text, flags=re.MULTILINE)


def _turns(item: Item, part: slice) -> str:
    turns = zip(item["speakers"][part], item["dialogue"][part], strict=True)
    return "\n".join(f"{speaker}: {turn}" for speaker, turn in turns)


TASKS = {
    "summarization": Task(
        texts=("instruction", "input", "output"),
        lists=(),
        document="input",
        prompt=lambda item: alpaca_prompt(item["instruction"], item["input"]),
        message=lambda item: f"{item['instruction']}\n\n{item['input']}",
        bare=lambda item: item["input"],
        reference=lambda item: item["output"],
        scored=lambda item, text: text,
        max_new_tokens=128,
        adapt=from_article,
    ),
    "conversation": Task(
        texts=("narrative",),
        lists=("dialogue", "speakers"),
        document="narrative",
        prompt=dialogue_prompt,
        message=dialogue_prompt,
        bare=lambda item: f"{item['narrative']}\n\n{_turns(item, slice(0, 1))}\n",
        reference=dialogue_reference,
        scored=spoken,
        max_new_tokens=256,
    ),
}


def load_items(path: str | Path, task: Task) -> list[Item]:
    """Read a dataset: a JSON list of objects, or one JSON object a line.

    A file that is not there is read under its other name, of ``OTHER_NAMES``, and a line says so.

    Raises
    ------
    InputError
        If the file is missing, empty or not JSON, or an item lacks a field or has one of
        another kind or an empty document; the message says which item, counted from 0.
    """
    path = Path(path)
    other = path.with_name(OTHER_NAMES.get(path.name, path.name))
    if other.exists() and not path.exists():
        LOGGER.warning(f"there is no {path}: {other} is read")
        path = other
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the dataset {path}: {error}") from error
    items = [task.adapt(item) for item in _parse(text, path)]
    if not items:
        raise InputError(f"the dataset {path} is empty")
    for index, item in enumerate(items):
        problem = _problem(item, task)
        if problem:
            raise InputError(f"{path}: item {index} {problem}")
    return items


def _problem(item: Any, task: Task) -> str | None:
    """What is wrong with an item, or None."""
    if not isinstance(item, dict):
        return f"is not an object with {', '.join(task.texts + task.lists)}"
    for name in task.texts + task.lists:
        if name not in item:
            return f"lacks the field {name!r}"
    for name in task.texts:
        if not isinstance(item[name], str):
            return f"has a field {name!r} that is not text"
    for name in task.lists:
        if not isinstance(item[name], list) or not all(isinstance(x, str) for x in item[name]):
            return f"has a field {name!r} that is not a list of texts"
    for name in task.texts + task.lists:
        if not is_text("".join(item[name])):
            return f"has a field {name!r} with half of a surrogate pair, which no text can hold"
    lengths = {len(item[name]) for name in task.lists}
    if len(lengths) > 1:
        return f"has fields of unequal length: {', '.join(task.lists)}"
    if lengths and min(lengths) < 2:
        return f"has fewer than two turns in {task.lists[0]!r}"
    if not item[task.document].strip():
        return f"has an empty field {task.document!r}"
    return None


def is_text(text: str) -> bool:
    """Whether a tokenizer can read it: half of a surrogate pair is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(text: str, path: str | Path) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {_broken_item(text)}{_why(error)}") from error
    items: list[Any] = []
    # Not splitlines(): a text may hold characters that it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path} is neither a JSON list nor JSON lines: line {number}:"
                    f" item {len(items)}: {_why(error)}"
                ) from error
    return items


def _broken_item(text: str) -> str:
    """Which item of a JSON list cannot be read, to put before the reason."""
    decoder, between = json.JSONDecoder(), set(" \t\r\n,")
    at = text.index("[") + 1
    for number in itertools.count():
        while text[at : at + 1] in between:
            at += 1
        if text[at : at + 1] in ("", "]"):
            break
        try:
            _, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return f"item {number}: "
    return ""


def _why(error: Exception) -> str:
    """What is wrong with JSON, in one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return "a number has too many digits"
    return str(error)


def sample(items: Sequence[Any], n_obs: int | None, seed: int) -> list[Any]:
    """``n_obs`` items drawn at random without replacement, in their order; None is all.

    All too, and a line says so, if there are fewer.

    Raises
    ------
    InputError
        If ``n_obs`` is below 1.
    """
    if n_obs is None:
        return list(items)
    if n_obs < 1:
        raise InputError(f"n_obs must be at least 1, got {n_obs}")
    warn_of_fewer(n_obs, len(items))
    if n_obs >= len(items):
        return list(items)
    drawn = random.Random(seed).sample(range(len(items)), n_obs)
    return [items[index] for index in sorted(drawn)]


def warn_of_fewer(n_obs: int | None, count: int) -> None:
    """Say so where a dataset has fewer items than are asked for."""
    if n_obs is not None and n_obs > count:
        LOGGER.warning(f"--n_obs {n_obs}: all of the dataset is taken, which has {count}")


def make_prompt(
    item: Item,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    kind: str | None = None,
    start: int | None = None,
) -> str:
    """An item's prompt, its document cut so that the prompt has at most ``max_tokens``.

    The instruction and the end of the template are kept whole. What :func:`prompt_tokens` makes
    of the prompt is what counts.

    Parameters
    ----------
    kind
        One of PROMPTS, or the default of :func:`prompt_kind`.
    start
        A token that counts too: see :func:`prompt_tokens`.

    Raises
    ------
    InputError
        If the template alone is longer than that, or the tokenizer's cannot be used.
    """
    kind = prompt_kind(kind, tokenizer)

    def written(item: Item) -> str:
        if kind == "chat":
            return chat_prompt([user(task.message(item))], tokenizer)
        return task.bare(item) if kind == "none" else task.prompt(item)

    prompt = written(item)
    if max_tokens is None:
        return prompt
    excess = prompt_length(tokenizer, prompt, start) - max_tokens
    if excess <= 0:
        return prompt
    document = tokenizer(item[task.document], verbose=False, add_special_tokens=False)["input_ids"]
    while excess > 0:
        # Cutting can change how the seam is tokenized, so look again.
        document = document[: len(document) - excess]
        if not document:
            raise InputError(
                f"max_tokenizer_length {max_tokens} leaves no room for the document:"
                " the prompt's template alone is longer"
            )
        text = tokenizer.decode(document, skip_special_tokens=True)
        prompt = written({**item, task.document: text})
        excess = prompt_length(tokenizer, prompt, start) - max_tokens
    return prompt


def make_prompts(
    items: Sequence[Item],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    kind: str | None = None,
    start: int | None = None,
    workers: int = 1,
) -> list[str]:
    """:func:`make_prompt` of each item, in as many threads as there are ``workers``.

    Tokenizers let go of Python's lock, but one cannot serve two threads: each has a copy.
    """

    def of(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        return [make_prompt(item, task, tokenizer, max_tokens, kind, start) for item in items]

    workers = min(workers, len(items))
    if workers <= 1:
        return of(items, tokenizer)
    size = math.ceil(len(items) / workers)
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    copies = [copy.deepcopy(tokenizer) for _ in parts]
    with ThreadPoolExecutor(workers) as pool:
        return list(itertools.chain.from_iterable(pool.map(of, parts, copies)))


def prompt_room(
    model: PreTrainedModel, max_new_tokens: int, config: KeyformerConfig | None = None
) -> int | None:
    """The longest prompt in tokens, so that what is generated has positions too; None is any.

    Parameters
    ----------
    config
        The method: with new positions and prompts in chunks, only the cache has to fit.

    Raises
    ------
    InputError
        If the model's table of positions has no room for a prompt.
    """
    table = model.get_decoder().position_table
    chunks_move = config and config.positions == "new" and config.prefill_chunk
    if table is None or chunks_move:
        return None
    room = table - max_new_tokens + 1  # the last generated token is not fed back
    if room < 1:
        raise InputError(
            f"max_new_tokens must be at most the model's {table} positions, got {max_new_tokens}"
        )
    return room


def trained_room(model: PreTrainedModel, max_new_tokens: int) -> int | None:
    """As :func:`prompt_room`, within the positions a model was trained with where it says so.

    Rotations go on beyond those, and models write nonsense there.

    Raises
    ------
    InputError
        If there is no room for a prompt.
    """
    trained = getattr(model.config, "max_position_embeddings", None)
    room = prompt_room(model, max_new_tokens)
    if room is not None or trained is None:
        return room
    if max_new_tokens > trained:
        raise InputError(
            f"max_new_tokens must be at most the {trained} positions that the model was trained"
            f" with, got {max_new_tokens}"
        )
    return trained - max_new_tokens + 1


def prompt_kind(asked: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """One of PROMPTS: the one asked for; else chat if the tokenizer has a template, or alpaca.

    Raises
    ------
    InputError
        If chat is asked for and there is no template.
    """
    if asked == "chat" and not tokenizer.chat_template:
        others = ", ".join(kind for kind in PROMPTS if kind != "chat")
        raise InputError(
            f"--prompt chat: the model's tokenizer has no chat template; allowed is {others}"
        )
    return asked or ("chat" if tokenizer.chat_template else "alpaca")


def chat_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Messages in the tokenizer's chat template, up to where the model answers.

    Raises
    ------
    InputError
        If the template cannot be used.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:  # a ValueError: it has several, and no default
        reason = " ".join(str(error).split())
        raise InputError(f"the tokenizer's chat template cannot be used: {reason}") from error


def conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, kind: str) -> str:
    """Messages as a prompt of one of PROMPTS, up to where the model answers.

    Raises
    ------
    InputError
        If the tokenizer's template cannot be used.
    """
    if kind == "chat":
        return chat_prompt(messages, tokenizer)
    if kind == "none":
        return "".join(f"{message['content']}\n\n" for message in messages)
    written = {"user": "### Instruction:\n{}\n\n### Response:\n", "assistant": "{}\n\n"}
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n"
    )
    said = (written[message["role"]].format(message["content"]) for message in messages)
    return opening + "".join(said)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: str | Sequence[str], **options: Any
) -> BatchEncoding:
    """Tokenize prompts of one kind; those that begin with the BOS, as chats do, get no second."""
    first = prompts if isinstance(prompts, str) else prompts[0]
    has_bos = bool(tokenizer.bos_token) and first.startswith(tokenizer.bos_token)
    # Quiet: a tokenizer warns of lengths that are the model's own business.
    return tokenizer(prompts, add_special_tokens=not has_bos, verbose=False, **options)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], start: int | None = None
) -> list[list[int]]:
    """What :func:`encode` makes of each prompt, after ``start``, a token that all begin with."""
    rows: list[list[int]] = encode(tokenizer, list(prompts))["input_ids"]
    if start is None:
        return rows
    return [row if row[:1] == [start] else [start, *row] for row in rows]


def prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str, start: int | None = None) -> int:
    """How many tokens :func:`prompt_tokens` makes of one prompt."""
    return len(prompt_tokens(tokenizer, [prompt], start)[0])
