"""The committed questions, and the prompts of those with a gap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset

DATA = Path(__file__).parents[1] / "data"


def load(name: str, **settings: Any) -> DatasetDict:
    """The questions of a task: "test", and "train" for the examples of a prompt.

    ``settings`` are what lm-eval passes to every dataset: its metadata and the model's arguments.
    """
    files = {"test": f"{name}.jsonl", "train": f"{name}_train.jsonl"}
    return load_dataset("json", data_files={split: str(DATA / f) for split, f in files.items()})


def filled_option(question: dict[str, Any]) -> int:
    """Index of the option that fills the gap."""
    return int(question["answer"]) - 1


def filled_gaps(question: dict[str, Any]) -> list[str]:
    """The report and the sentence as far as its gap, each option in it."""
    before = question["context"] + "\n" + question["sentence"].partition("_")[0]
    return [before + question[option] for option in ("option1", "option2")]


def after_gap(question: dict[str, Any]) -> str:
    """The sentence after its gap."""
    return question["sentence"].partition("_")[2].strip()
