"""A table or figure of the paper as a sweep: its flags, what it measures, the files it writes."""

from __future__ import annotations

import argparse
import csv
import io
import math
import shlex
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from keyformer.config import InputError, KeyformerConfig
from keyformer_evaluation.records.processes import is_main
from keyformer_evaluation.records.results import (
    check_record,
    check_writable,
    record,
    write_json,
    write_text,
)
from keyformer_evaluation.studies.measures import SUMMARIES, OnItems
from keyformer_evaluation.studies.published import papers_model
from keyformer_evaluation.studies.sweep import (
    Cell,
    Found,
    Labels,
    Measure,
    Request,
    Row,
    Run,
    Steps,
    carry_out,
    sources,
    summarize,
)
from keyformer_evaluation.studies.written import Panel, Pictures, Written
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.data import TASKS, Item, load_items, sample

ROOT = Path(__file__).parents[3]
BUNDLED = {
    "summarization": ROOT / "summarization" / "data" / "sample_eval.json",
    "conversation": ROOT / "conversation" / "data" / "sample_eval.json",
}
ARTICLES = ROOT / "summarization" / "data" / "articles.json"
BUNDLED_MODELS = tuple(
    ROOT / "models" / f"{name}-tiny-keyformer" for name in ("mpt", "gptj", "cerebras")
)
KINDS = {"summarization": "news", "conversation": "dialogue"}
"""What the bundled models' corpus calls a task's documents."""

QUICK = {"n_obs": 2, "max_new_tokens": 4, "characters": 120}
"""What --quick takes of the dataset and of each document, and generates."""

PLAIN: dict[str, Any] = {
    **{"prompt": None, "max_tokenizer_length": None, "beam": 1, "early_stopping": False},
    **{"min_gen_length": 0, "max_new_tokens": None},
}
"""What prompts are and how texts are generated, by the flags' names, unless they say otherwise."""

PAPER: dict[str, Any] = {
    **{"prompt": "alpaca", "max_tokenizer_length": 1920, "beam": 4, "early_stopping": True},
    **{"min_gen_length": 30, "max_new_tokens": 128},
}
"""The same in the runs that the authors released: --settings paper."""

Results = dict[Panel, list[Row]]

Numbers = dict[tuple[Any, ...], tuple[float, ...]]
"""The paper's, by the values of a row's labels: of the metric that rows are compared by alone, or
ROUGE-1, 2 and L."""
Published = dict[tuple[str, str], Numbers]
"""By one of the paper's models, see :mod:`.published`, and task."""


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
    pictures
        By part of what it writes, each with files of its own, what draws its record.
    items
        Gives a task's documents where there is no --dataset_path; None has the bundled ones.
    generates
        Whether texts are generated for documents; without, there are no flags for either.
    models
        What is measured where there is neither --model_path nor --quick.
    measures
        What --measure is by default: one, or several at once; without any there is no such flag.
    paper
        What --settings paper sets.

    Raises
    ------
    InputError
        If a flag cannot be used or the output folder not be written.
    """

    def __init__(
        self,
        name: str,
        description: str | None,
        argv: Sequence[str] | None,
        pictures: Pictures,
        *,
        items: Callable[[str], list[Item]] | None = None,
        generates: bool = True,
        models: Sequence[Path] = BUNDLED_MODELS,
        measures: Sequence[str] = ("rouge",),
        paper: Mapping[str, Any] = PAPER,
        more_flags: Callable[[flag.Parser], object] = lambda parser: None,
    ) -> None:
        self.name = name
        self.pictures = pictures
        self.argv = sys.argv[1:] if argv is None else argv
        parser = flag.Parser(prog=f"{name}.py", description=description)
        parser.add_argument("--model_path", nargs="+", help="default: the bundled models")
        flag.n_obs_flag(parser)
        parser.add_argument(
            "--seeds", nargs="+", type=flag.SEED, default=[0, 1, 2], help="of the noise"
        )
        parser.add_argument("--device", help="default: a GPU for each process, or the CPU")
        parser.add_argument("--dtype", default="float32")
        parser.add_argument("--bs", type=flag.whole(1), default=8, help="batch size")
        parser.add_argument("--out", type=Path, help="default: paper/results/local, or quick")
        flag.store_flags(parser, None)
        parser.add_argument(
            "--quick",
            action="store_true",
            help="one model, one seed, the beginnings of two documents: only to see it work",
        )
        if generates:
            _generation_flags(parser, measures)
        more_flags(parser)
        flags = parser.parse_args(self.argv)
        settle(flags, paper)
        if flags.quick:
            models, flags.seeds = BUNDLED_MODELS[:1], flags.seeds[:1]
            flags.n_obs = flags.n_obs or QUICK["n_obs"]
            if generates:
                flags.max_new_tokens = flags.max_new_tokens or QUICK["max_new_tokens"]
        flags.model_path = flags.model_path or [*map(str, models)]
        flags.out = flags.out or ROOT / "paper" / "results" / ("quick" if flags.quick else "local")
        flags.store = flags.store or flags.out / "measured.sqlite"
        self.flags = flags
        self.found: list[Found] = []
        self.differences: list[Labels] = []
        check_writable(flags.out, folder=True)
        for part in pictures:
            written, *files = (self._file(kind, part) for kind in ("json", "csv", "png", "svg"))
            check_record(written, *files, script=f"{name}.py", store=flags.store)
        self.items = self._load(items) if generates else {}
        for task in self.items:
            if flags.min_gen_length > self.max_new_tokens(task):
                raise InputError(
                    f"--min_gen_length {flags.min_gen_length} is more than the"
                    f" {self.max_new_tokens(task)} tokens that are generated at most"
                )

    def _load(self, items: Callable[[str], list[Item]] | None) -> dict[str, list[Item]]:
        """By task its documents."""
        given = self.by_task("dataset_path") if self.flags.dataset_path else {}
        found: dict[str, list[Item]] = {}
        for task in self.flags.task:
            if items is not None and not given:
                of_task = items(task)
            else:
                of_task = load_items(given.get(task, BUNDLED[task]), TASKS[task])
            found[task] = self.sample(task, of_task)
        return found

    def by_task(self, name: str) -> dict[str, Path]:
        """The file of each task that a flag names.

        Raises
        ------
        InputError
            If there are more or fewer than tasks.
        """
        paths, tasks = getattr(self.flags, name), self.flags.task
        if len(paths) != len(tasks):
            raise InputError(
                f"--{name} must name one file for each --task, got {len(paths)} for {len(tasks)}"
            )
        return dict(zip(tasks, paths, strict=True))

    def sample(self, task: str, items: list[Item]) -> list[Item]:
        """As many of a task's documents as --n_obs and --quick say."""
        drawn = sample(items, self.flags.n_obs, seed=0)
        if self.flags.quick:
            name = TASKS[task].document
            drawn = [{**item, name: item[name][: QUICK["characters"]]} for item in drawn]
        return drawn

    @property
    def models(self) -> list[str]:
        """The models' names, in their order."""
        return [Path(path).name for path in self.flags.model_path]

    def max_new_tokens(self, task: str) -> int:
        """How many tokens are generated for an item at most."""
        return self.flags.max_new_tokens or TASKS[task].max_new_tokens

    def measures(
        self,
        kind: type[OnItems] | None = None,
        items: Mapping[str, list[Item]] | None = None,
        **more: Any,
    ) -> dict[Panel, OnItems]:
        """A measure for each model and task, of a kind or what --measure says.

        Parameters
        ----------
        items
            By task; default: the study's own.
        """
        flags = self.flags
        kind = kind or SUMMARIES[flags.measure]
        return {
            (Path(path).name, task): kind(
                path=path,
                dtype=flags.dtype,
                task=task,
                items=of_task,
                bs=flags.bs,
                beam=flags.beam,
                max_new_tokens=self.max_new_tokens(task),
                prompt_kind=flags.prompt,
                max_prompt_tokens=flags.max_tokenizer_length,
                early_stopping=flags.early_stopping,
                min_new_tokens=flags.min_gen_length,
                **more,
            )
            for path in flags.model_path
            for task, of_task in (items or self.items).items()
        }

    def measure(
        self,
        cells: Iterable[Cell],
        measures: Mapping[Panel, OnItems] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Generator[Request, Found, Results]:
        """Every cell in every panel; what is in the store is not measured again.

        Parameters
        ----------
        measures
            What is measured in each panel; by default what --measure says.
        seeds
            By default those of the flags.
        """
        cells = list(cells)
        asked = {
            panel: [(cell, measure) for cell in cells]
            for panel, measure in (measures or self.measures()).items()
        }
        return (yield from self.collect(asked, seeds))

    def collect(
        self,
        asked: Mapping[Panel, Sequence[tuple[Cell, Measure]]],
        seeds: Sequence[int] | None = None,
    ) -> Generator[Request, Found, Results]:
        """In each panel cells that are measured each by a measure of its own."""
        runs = {
            panel: [(cell, self.runs(cell.config, measure, seeds)) for cell, measure in pairs]
            for panel, pairs in asked.items()
        }
        found = yield from self.find(
            run for of_panel in runs.values() for _, of_cell in of_panel for run in of_cell
        )
        return {
            panel: [summarize(cell, [found[run] for run in of_cell]) for cell, of_cell in of_panel]
            for panel, of_panel in runs.items()
        }

    def runs(
        self, config: KeyformerConfig, measure: Measure, seeds: Sequence[int] | None = None
    ) -> list[Run]:
        """One for each seed if the configuration draws noise, else one with the first."""
        seeds = seeds or self.flags.seeds
        used = seeds if config.draws_noise else seeds[:1]
        return [Run(measure, replace(config, seed=seed)) for seed in used]

    def beside(self, results: Results, published: Published) -> dict[Panel, Numbers]:
        """In each panel the paper's numbers, if it is one of its models and tasks."""
        known = {Path(path).name: papers_model(path) or "" for path in self.flags.model_path}
        return {(model, task): published.get((known[model], task), {}) for model, task in results}

    def find(self, runs: Iterable[Run]) -> Generator[Request, Found, Found]:
        """Have runs measured."""
        flags = self.flags
        found = yield Request(list(runs), flags.store, flags.device, flags.resume)
        self.found.append(found)
        return found

    def write(self, results: Results, part: str = "") -> None:
        """The rows as CSV and, with how they came about, as JSON; the picture of these.

        Parameters
        ----------
        part
            Follows the study's name in the files' names.
        """
        table: list[Labels] = []
        records = []
        for (model, task), rows in results.items():
            for row in rows:
                line = {"model": model, "task": task, **row.labels, "seeds": row.seeds}
                table.append({**line, **_flat(row)})
                records.append({**table[-1], "config": _changed(row.config)})
        self.write_table(table, records, part)

    def write_table(self, table: list[Labels], records: list[Labels], part: str = "") -> None:
        """``table`` as CSV, ``records``, its lines with settings, in the record; what draws it."""
        if not is_main():
            return
        text = io.StringIO()
        columns = dict.fromkeys(name for line in table for name in line)
        writer = csv.DictWriter(text, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_text(self._file("csv", part), text.getvalue())
        settings = {name: getattr(self.flags, name) for name in ("bs", "dtype", "seeds")}
        if self.items:
            settings["items"] = {task: len(of) for task, of in self.items.items()}
            settings["measure"] = getattr(self.flags, "measure", None)
            settings["settings"] = getattr(self.flags, "settings", None)
            settings |= {name: getattr(self.flags, name) for name in PLAIN}
            settings["prompt"] = self.flags.prompt or "default"
            settings["max_new_tokens"] = {task: self.max_new_tokens(task) for task in self.items}
        if self.differences:
            settings["differences"] = self.differences
        came = record(sources(self.found))
        came["command"] = shlex.join(["python", f"paper/{self.name}.py", *self.argv])
        written = Written(self._file("json", part), {**came, **settings, "rows": records})
        write_json(written.path, written.record)
        written.write(self.pictures[part](written))
        print(f"table, record and picture: {self._file('{csv,json,png,svg}', part)}")

    def _file(self, kind: str, part: str = "") -> Path:
        return self.flags.out / f"{self.name}{part}.{kind}"


def _generation_flags(parser: flag.Parser, measures: Sequence[str]) -> None:
    """Flags of documents and of what is generated for them, measured so by default."""
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["summarization"])
    parser.add_argument(
        "--dataset_path", nargs="+", type=Path, help="one a task (default: the bundled ones)"
    )
    if measures:
        several = len(measures) > 1
        parser.add_argument(
            "--measure",
            choices=SUMMARIES,
            nargs="+" if several else None,
            default=list(measures) if several else measures[0],
            help="of summaries: rouge; reference, the negative log-likelihood of a token of the"
            " reference; agreement with the full cache's; continued, that likelihood of a token of"
            " the document's end (default: %(default)s)",
        )
    parser.add_argument(
        "--settings",
        choices=("paper",),
        help="the six flags below as in the runs that the paper's authors released: the alpaca"
        " prompt cut to 1920 tokens, four beams with early stopping, 30 to 128 new tokens",
    )
    flag.prompt_flag(parser)
    parser.add_argument(
        "--max_tokenizer_length",
        type=flag.whole(1, 2**20),
        help="longest prompt in tokens (default: what the positions have room for)",
    )
    parser.add_argument("--beam", type=flag.WIDTH, help="beams (default: 1)")
    parser.add_argument(
        "--early_stopping", action=argparse.BooleanOptionalAction, help="of beam search"
    )
    parser.add_argument("--min_gen_length", type=flag.whole(0), help="generated at least")
    parser.add_argument("--max_new_tokens", type=flag.whole(1), help="default: the task's")


def settle(flags: argparse.Namespace, paper: Mapping[str, Any]) -> None:
    """Give those of ``PLAIN`` that no flag names their values: by --settings, or the plain ones.

    Raises
    ------
    InputError
        If a flag says otherwise than --settings.
    """
    chosen = getattr(flags, "settings", None)
    for name, value in (paper if chosen else PLAIN).items():
        given = getattr(flags, name, None)
        if chosen and given not in (None, value):
            said = f"--no-{name}" if given is False else f"--{name} {given}"
            raise InputError(f"{said} contradicts --settings {chosen}, where {name} is {value}")
        setattr(flags, name, value if given is None else given)


def run_study(main: Callable[[Sequence[str] | None], Steps]) -> None:
    """Run a script of paper/ by itself; what it cannot use is one line and exit code 2."""
    flag.run_main(lambda argv: carry_out([main(argv)]))


def _flat(row: Row) -> Labels:
    """Each metric's mean and interval as columns."""
    columns: Labels = {}
    for metric, (mean, low, high) in row.values.items():
        if math.isnan(mean):
            continue
        columns |= {metric: round(mean, 4), f"{metric}_low": round(low, 4)}
        columns[f"{metric}_high"] = round(high, 4)
    return columns


def _changed(config: KeyformerConfig) -> Labels:
    """The settings that are not the defaults."""
    default = KeyformerConfig().plain()
    return {name: value for name, value in config.plain().items() if value != default[name]}
