"""A table or figure of the paper as a sweep: flags, models, records, tables and pictures."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from transformers import PreTrainedModel, PreTrainedTokenizerBase

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keyformer.config import InputError, KeyformerConfig
from keyformer.evaluation import flags as flag
from keyformer.evaluation.data import TASKS, Item, load_items, make_prompt, sample
from keyformer.evaluation.generation import generate
from keyformer.evaluation.results import (
    check_writable,
    run_record,
    write_json,
    write_text,
    write_whole,
)
from keyformer.evaluation.rouge import rouge
from keyformer.evaluation.run import prompt_room
from keyformer.evaluation.sweep import Cell, Labels, PerItem, Row, Store, run_sweep
from keyformer.integration import check_device, load_model

ROOT = Path(__file__).parents[3]
BUNDLED = {
    "summarization": ROOT / "summarization" / "data" / "sample_eval.json",
    "conversation": ROOT / "conversation" / "data" / "sample_eval.json",
}
MODELS = ("mpt-tiny-keyformer", "gptj-tiny-keyformer", "cerebras-tiny-keyformer")
COLORS = [f"C{number}" for number in range(10)]
METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}

Panel = tuple[str, str]
"""A model's name and a task: what gets a table and a panel of its own."""
Results = dict[Panel, list[Row]]
Published = dict[str, dict[tuple[Any, ...], float]]
"""By model, and by the values of a row's labels, the number that the paper has."""


class Study:
    """What one script of paper/ does: cells in; a table, a CSV, a record and a picture out.

    Parameters
    ----------
    name
        Of the script and of the files it writes.
    description
        What ``--help`` says.
    argv
        The command line; None takes the process's own.

    Raises
    ------
    InputError
        If a flag cannot be used or the output folder not be written.
    """

    def __init__(self, name: str, description: str | None, argv: Sequence[str] | None) -> None:
        self.name = name
        parser = flag.Parser(description=description)
        parser.add_argument("--model_path", nargs="+", help="default: the bundled models")
        parser.add_argument("--task", nargs="+", choices=TASKS, default=["summarization"])
        parser.add_argument(
            "--dataset_path", nargs="+", type=Path, help="one a task (default: the bundled ones)"
        )
        parser.add_argument("--n_obs", type=int, help="items, drawn at random (default: all)")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise")
        parser.add_argument("--device", help="default: a GPU if there is one")
        parser.add_argument("--dtype", default="float32")
        parser.add_argument("--bs", type=int, default=8, help="batch size")
        parser.add_argument("--beam", type=int, default=1, help="beams; the paper's runs use 4")
        parser.add_argument("--max_new_tokens", type=int, default=128)
        parser.add_argument("--out", type=Path, default=ROOT / "paper" / "results")
        flags = parser.parse_args(argv)
        flags.model_path = flags.model_path or [str(ROOT / "models" / name) for name in MODELS]
        flags.dataset_path = flags.dataset_path or [BUNDLED[task] for task in flags.task]
        if len(flags.dataset_path) != len(flags.task):
            raise InputError(
                f"--dataset_path must name one file for each --task, got"
                f" {len(flags.dataset_path)} for {len(flags.task)}"
            )
        for option in ("bs", "beam", "max_new_tokens"):
            if getattr(flags, option) < 1:
                raise InputError(f"--{option} must be at least 1, got {getattr(flags, option)}")
        self.flags = flags
        self.file = flags.out / name
        check_writable(self.file.with_suffix(".json"))
        self.store = Store(self.file.with_suffix(".jsonl"))
        self.items = {
            task: sample(load_items(path, TASKS[task]), flags.n_obs, seed=0)
            for task, path in zip(flags.task, flags.dataset_path, strict=True)
        }

    def measure(self, cells: Iterable[Cell]) -> Results:
        """ROUGE of every cell for each model and task, resuming where a run was stopped."""
        cells = list(cells)
        results: Results = {}
        for path in self.flags.model_path:
            for task in self.flags.task:
                measured = _Rouge(self.flags, path, task, self.items[task])
                rows = run_sweep(cells, self.flags.seeds, measured, self.store, measured.setting)
                results[Path(path).name, task] = rows
        return results

    def write(self, results: Results, figure: Figure) -> None:
        """The rows as CSV and, with how they came about, as JSON; the picture as PNG and SVG."""
        table = [
            {"model": model, "task": task, **row.labels, "seeds": row.seeds, **_flat(row)}
            for (model, task), rows in results.items()
            for row in rows
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
        write_text(self.file.with_suffix(".csv"), text.getvalue())
        settings = {"items": {task: len(items) for task, items in self.items.items()}}
        for option in ("beam", "bs", "dtype", "max_new_tokens", "seeds"):
            settings[option] = getattr(self.flags, option)
        record = {**run_record(check_device(self.flags.device)), **settings, "rows": table}
        write_json(self.file.with_suffix(".json"), record)
        for kind in ("png", "svg"):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=150, metadata=_UNDATED[kind])
            content = picture.getvalue()
            write_whole(self.file.with_suffix(f".{kind}"), partial(_write, content))
        pyplot.close(figure)
        print(f"table, record and picture in {self.file}.csv, .json, .png and .svg")


class _Rouge:
    """ROUGE of each item under a configuration; the model is loaded when it is first needed."""

    def __init__(self, flags: argparse.Namespace, path: str, task: str, items: list[Item]) -> None:
        self.flags, self.path, self.task, self.items = flags, path, TASKS[task], items
        content = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
        generation = {name: getattr(flags, name) for name in _GENERATION}
        self.setting: Labels = {"model": path, "task": task, "items": content[:16], **generation}

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
        model, tokenizer = load_model(self.path, dtype=self.flags.dtype, device=self.flags.device)
        room = prompt_room(model, self.flags.max_new_tokens)
        return model, tokenizer, [make_prompt(i, self.task, tokenizer, room) for i in self.items]

    def __call__(self, config: KeyformerConfig) -> PerItem:
        model, tokenizer, prompts = self._loaded
        options = {"num_beams": self.flags.beam, "max_new_tokens": self.flags.max_new_tokens}
        generated = generate(
            model,
            tokenizer,
            prompts,
            config,
            batch_size=self.flags.bs,
            progress=False,
            **options,
        )
        scored = self.task.scored
        scores = rouge(
            [scored(item, of[0]) for item, of in zip(self.items, generated.texts, strict=True)],
            [scored(item, self.task.reference(item)) for item in self.items],
        )
        return {metric: [round(of[metric], 4) for of in scores] for metric in METRICS}


_GENERATION = ("bs", "beam", "max_new_tokens", "dtype")
_UNDATED: dict[str, Any] = {"png": {"Software": None}, "svg": {"Date": None}}


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _flat(row: Row) -> Labels:
    """Each metric's mean and interval as columns."""
    columns: Labels = {}
    for metric, (mean, low, high) in row.values.items():
        columns |= {metric: round(mean, 4), f"{metric}_low": round(low, 4)}
        columns[f"{metric}_high"] = round(high, 4)
    return columns


def print_tables(results: Results, published: Published | None = None) -> None:
    """For each panel its rows: labels, ROUGE with half the interval's width, and the paper's.

    Parameters
    ----------
    published
        The paper's ROUGE-2 where it has the model.
    """
    for (model, task), rows in results.items():
        known = (published or {}).get(model, {})
        print(f"\n{model}, {task} (mean and 95 % interval)")
        names = list(rows[0].labels)
        heads = [*names, "seeds", *METRICS.values(), *(["paper's ROUGE-2"] if known else [])]
        lines = [heads]
        for row in rows:
            line = [str(value) for value in row.labels.values()] + [str(row.seeds)]
            for metric in METRICS:
                mean, low, high = row.values[metric]
                line.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            if known:
                number = known.get(tuple(row.labels.values()))
                line.append("" if number is None else f"{number:.2f}")
            lines.append(line)
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def panels(results: Results, title: str, ylabel: str = "ROUGE-2") -> tuple[Figure, list[Axes]]:
    """A figure with one panel a model and task, in the order of ``results``."""
    count = len(results)
    columns = min(count, 3)
    figure, grid = pyplot.subplots(
        -(-count // columns), columns, figsize=(1 + 4 * columns, 3.4 * -(-count // columns)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    axes = list(grid.flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    for ax, (model, task) in zip(axes, results, strict=False):
        ax.set_title(f"{model}, {task}", fontsize=9)
        ax.set_ylabel(ylabel)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure, axes[:count]


def draw_line(
    ax: Axes, rows: Sequence[Row], x: str, label: str, color: Any, metric: str = "rouge2"
) -> None:
    """A metric against a label, its interval shaded."""
    at = [row.labels[x] for row in rows]
    mean, low, high = zip(*(row.values[metric] for row in rows), strict=True)
    ax.plot(at, mean, marker="o", markersize=4, label=label, color=color)
    ax.fill_between(at, low, high, alpha=0.15, color=color, linewidth=0)


def draw_bars(ax: Axes, rows: Sequence[Row], metric: str = "rouge2") -> None:
    """A metric of every row, its interval as a bar."""
    names = ["\n".join(str(value) for value in row.labels.values()) for row in rows]
    mean, low, high = ([row.values[metric][i] for row in rows] for i in range(3))
    spread = [
        [m - a for m, a in zip(mean, low, strict=True)],
        [b - m for m, b in zip(mean, high, strict=True)],
    ]
    ax.bar(names, mean, yerr=spread, capsize=3, color=COLORS[: len(rows)])
    ax.tick_params(axis="x", labelsize=8)


def draw_level(ax: Axes, full: Row, metric: str = "rouge2") -> None:
    """Full attention, and 99 % of it, the bar that MLPerf sets."""
    level = full.values[metric][0]
    ax.axhline(level, color="black", linewidth=1, label="full")
    ax.axhline(0.99 * level, color="red", linewidth=1, linestyle=":", label="99 % of full")


def draw_grid(ax: Axes, rows: Sequence[Row], x: str, y: str, metric: str = "rouge2") -> None:
    """A metric over two labels, as colours and numbers."""
    across = list(dict.fromkeys(row.labels[x] for row in rows))
    down = list(dict.fromkeys(row.labels[y] for row in rows))
    found = {(row.labels[y], row.labels[x]): row.values[metric][0] for row in rows}
    values = [[found[b, a] for a in across] for b in down]
    ax.imshow(values, cmap="viridis", aspect="auto")
    ax.grid(False)
    ax.set_xlabel(x)
    ax.set_xticks(range(len(across)), across)
    ax.set_yticks(range(len(down)), down)
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", color="white", fontsize=8)
