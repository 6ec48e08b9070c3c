"""The same items under several methods and cache sizes, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from keyformer.config import CACHE_DTYPES, METHODS, InputError, KeyformerConfig
from keyformer.quantize import weight_bytes
from keyformer_evaluation.records.processes import is_main
from keyformer_evaluation.records.results import check_record, record, write_json
from keyformer_evaluation.records.store import Store
from keyformer_evaluation.records.work import Job, finishing, keys_of
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.data import (
    TASKS,
    Item,
    Message,
    Task,
    conversation,
    load_items,
    make_prompt,
    prompt_kind,
    sample,
    trained_room,
)
from keyformer_evaluation.tasks.generation import Generated
from keyformer_evaluation.tasks.retrieval import answered, load_articles, questions
from keyformer_evaluation.tasks.run import check_lengths, generated, generation, load, summary

ANSWER_TOKENS = 16
"""The longest answer to a question."""

Setting = tuple[str, int, KeyformerConfig]
"""Method, seed and configuration of a run."""


def compare(
    argv: Sequence[str] | None, description: str | None, task_name: str, here: Path
) -> None:
    """Parse the flags, run every row, print the table, write the record.

    Parameters
    ----------
    argv
        The command line; None takes the process's own.
    description
        What ``--help`` says.
    task_name
        A key of ``TASKS``.
    here
        The script's folder, with data/ in it.

    Raises
    ------
    InputError
        If a flag, the dataset, the model or the record's path cannot be used.
    """
    task = TASKS[task_name]
    flags = parse(argv, description, task, here)
    if flags.record:
        check_record(flags.record, store=flags.store)
    settings = list(rows(flags))
    path = flags.dataset_path
    dataset = load_articles(path) if flags.questions else load_items(path, task)
    numbers = chosen(len(dataset), flags)
    items = [dataset[number] for number in numbers]
    store = Store(flags.store)
    model, tokenizer = load(flags)
    room = trained_room(model, flags.max_new_tokens)
    kind = prompt_kind(flags.prompt, tokenizer)
    prompts = [make_prompt(item, task, tokenizer, room, kind) for item in items]
    asked = questions_of(items) if flags.questions else []
    asking = [conversation(question.messages, tokenizer, kind) for question in asked]
    if asked:
        whose = [f"item {numbers[question.item]} with a question" for question in asked]
        room = trained_room(model, ANSWER_TOKENS)
        check_lengths(asking, whose, tokenizer, room, "leave out --questions")

    def jobs_of(these: Sequence[str], most: int) -> list[Job]:
        options = {"num_beams": flags.beam, "max_new_tokens": most}
        return [
            generation(flags, model, tokenizer, these, config, seed, **options)
            for _, seed, config in settings
        ]

    texts, answers = jobs_of(prompts, flags.max_new_tokens), jobs_of(asking, ANSWER_TOKENS)
    jobs = [*texts, *answers]
    with finishing(jobs, store, model.device, resume=flags.resume, unit="prompt") as (_, stopped):
        done = Comparison(
            task,
            settings,
            numbers,
            items,
            asked,
            texts=[generated(job, store) for job in texts],
            answers=[generated(job, store) for job in answers],
        )
        results = done.rows(flags.rouge_tokenizer)
        if is_main() and done.common:
            names = [name_of(*setting, several=len(flags.seeds) > 1) for setting in settings]
            done.show(names, flags.show)
            if stopped:
                of_all = f"{len(done.common)} of {len(items)}"
                print(f"\nstopped: {of_all} items are done under every method")
            print_table(results)
        if is_main() and flags.record and not stopped:
            described = {"model": flags.model_name, "task": task_name, "items": len(items)}
            described |= {"prompt": kind, "beam": flags.beam, "quantize": flags.quantize}
            described["rouge_tokenizer"] = flags.rouge_tokenizer
            described["weight_bytes"] = weight_bytes(model)
            came = record(store.sources(keys_of(jobs)))
            write_json(flags.record, {**described, **came, "rows": results})


def name_of(method: str, seed: int, config: KeyformerConfig, several: bool) -> str:
    """What tells a run from others, its seed where it draws with ``several``."""
    size = "" if method == "full" else f" {config.kv_cache:g} %"
    return f"{method}{size}" + (f", seed {seed}" if several and config.draws_noise else "")


def chosen(count: int, flags: argparse.Namespace) -> list[int]:
    """Which of a dataset's items --items or --n_obs ask for, by their numbers.

    Raises
    ------
    InputError
        If there are not so many.
    """
    if not flags.items:
        return sample(range(count), flags.n_obs, seed=0)
    for number in flags.items:
        if number >= count:
            raise InputError(f"--items must be from 0 to {count - 1}, got {number}")
    return flags.items


@dataclass(frozen=True)
class Question:
    """One about an item.

    Attributes
    ----------
    item
        Its number.
    text, answer
        What is asked, and what a right answer contains.
    messages
        The item's document and the question.
    """

    item: int
    text: str
    answer: str
    messages: list[Message]


def questions_of(items: Sequence[Item]) -> list[Question]:
    """Those of all items, in their order."""
    asked = ((number, one) for number, item in enumerate(items) for one in item["questions"])
    return [
        Question(number, one["question"], one["answer"], prompted["messages"])
        for (number, one), prompted in zip(asked, questions(items), strict=True)
    ]


@dataclass(frozen=True)
class Comparison:
    """What every run wrote; if it was stopped, over the same items: those that all have.

    Attributes
    ----------
    settings
        Method, seed and configuration of each run.
    numbers
        Of the items, in their dataset.
    asked
        Questions about them.
    texts, answers
        For each run what it wrote, by the number of the item and of the question.
    """

    task: Task
    settings: Sequence[Setting]
    numbers: Sequence[int]
    items: Sequence[Item]
    asked: Sequence[Question]
    texts: Sequence[dict[int, Generated]]
    answers: Sequence[dict[int, Generated]]

    @cached_property
    def common(self) -> list[int]:
        """The items that every run is done with."""
        return sorted(set.intersection(*map(set, self.texts)))

    @cached_property
    def common_asked(self) -> list[int]:
        """The questions that every run has answered."""
        return sorted(set.intersection(*map(set, self.answers)))

    def rows(self, rouge_tokenizer: str) -> list[dict[str, Any]]:
        """Each run's figures."""
        found = []
        runs = zip(self.settings, self.texts, self.answers, strict=True)
        for (method, seed, config), texts, answers in runs:
            row = {"method": method, "kv_cache": config.kv_cache, "seed": seed}
            written = [texts[item] for item in self.common]
            done = [self.items[item] for item in self.common]
            figures = summary(written, done, self.task, rouge_tokenizer)
            if self.asked:
                right = [
                    answered(answers[n].texts[0], self.asked[n].answer) for n in self.common_asked
                ]
                figures |= {"questions": len(right), "answered": sum(right)}
            found.append({**row, "config": config.plain(), **figures})
        return found

    def show(self, names: Sequence[str], most: int) -> None:
        """Print what each run, by these names, wrote for the first items."""
        for item in self.common[:most]:
            reference = self.task.reference(self.items[item])
            print(f"\nitem {self.numbers[item]}\n  reference: {_line(reference)}")
            print_texts(names, [of[item] for of in self.texts])
            for n in self.common_asked:
                if self.asked[n].item == item:
                    print(f"  {self.asked[n].text} ({self.asked[n].answer})")
                    print_texts(names, [of[n] for of in self.answers])


def print_texts(names: Sequence[str], texts: Sequence[Generated]) -> None:
    """What each run wrote, a line each."""
    for name, of in zip(names, texts, strict=True):
        print(f"    {name}: {_line(of.texts[0])}")


def _line(text: str) -> str:
    return " ".join(text.split())


def parse(
    argv: Sequence[str] | None, description: str | None, task: Task, here: Path
) -> argparse.Namespace:
    """The flags, checked.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    parser = flag.Parser(description=description)
    flag.model_flags(parser)
    default = KeyformerConfig()
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--kv_cache",
        nargs="+",
        type=flag.PERCENT_ABOVE_0,
        default=[50.0],
        help="cache sizes in %% of the prompt",
    )
    parser.add_argument("--recent", type=flag.PERCENT, default=default.recent)
    parser.add_argument("--cache_dtype", choices=CACHE_DTYPES, default=default.cache_dtype)
    flag.chunk_flag(parser)
    parser.add_argument(
        "--seeds", nargs="+", type=flag.SEED, default=[0], help="for methods that draw noise"
    )
    flag.prompt_flag(parser)
    parser.add_argument("--dataset_path", default=here / "data" / "sample_eval.json")
    which = parser.add_mutually_exclusive_group()
    flag.n_obs_flag(which)
    which.add_argument("--items", nargs="+", type=flag.whole(0), help="or these, by their numbers")
    parser.set_defaults(questions=False)
    if task is TASKS["summarization"]:
        parser.add_argument(
            "--questions",
            action="store_true",
            help="also ask the questions that come with each item, as data/articles.json has them",
        )
    parser.add_argument("--bs", type=flag.whole(1), default=8)
    parser.add_argument("--beam", type=flag.WIDTH, default=1)
    parser.add_argument("--max_new_tokens", type=flag.whole(1), default=task.max_new_tokens)
    parser.add_argument(
        "--show", type=flag.whole(0), default=0, help="print the texts of this many items"
    )
    flag.rouge_flag(parser)
    flag.record_flag(parser)
    flag.store_flags(parser, here / "out" / "finished.sqlite")
    return parser.parse_args(argv)


def rows(flags: argparse.Namespace) -> Iterator[Setting]:
    """Each run as (method, seed, configuration); what draws no noise runs once."""
    for method in flags.methods:
        for kv_cache in flags.kv_cache if method != "full" else [100.0]:
            settings: dict[str, Any] = {"recent": flags.recent, "cache_dtype": flags.cache_dtype}
            settings["prefill_chunk"] = flags.prefill_chunk
            config = KeyformerConfig.preset(method, kv_cache=kv_cache, **settings)
            for seed in flags.seeds if config.draws_noise else flags.seeds[:1]:
                yield method, seed, config


def print_table(results: list[dict[str, Any]]) -> None:
    """ROUGE, questions answered if any were asked, cache bytes and speed, a line for each run."""
    asked = "answered" in results[0]
    head = f"\n{'method':14}{'cache %':>8}{'seed':>6}{'ROUGE-1':>9}{'ROUGE-2':>9}{'ROUGE-L':>9}"
    print(head + asked * f"{'answered':>10}" + f"{'KV KiB/item':>12}{'tokens/s':>10}")
    for row in results:
        size = "all" if row["method"] == "full" else f"{row['kv_cache']:g}"
        right = f"{row['answered']} of {row['questions']}" if asked else ""
        print(
            f"{row['method']:14}{size:>8}{row['seed']:>6}{row['rouge1']:>9.2f}{row['rouge2']:>9.2f}"
            f"{row['rougeL']:>9.2f}{right:>{10 * asked}}{row['kv_bytes_end'] / 1024:>12.0f}"
            f"{row['tokens_per_second']:>10.1f}"
        )
