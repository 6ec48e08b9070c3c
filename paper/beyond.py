"""Beyond the paper: is there a score that beats window, H2O and Keyformer everywhere?

Sweeps forgetting and normalize with the recent window, temperature and noise, on each task's
ROUGE-2 and on the likelihood of continued text: bits per token of a document's second half after
its first half was evicted. Settings are chosen on documents of their own at 30 % of the cache, by
the worst of their comparisons; the best are measured at every size on the documents reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from keyformer.config import InputError, KeyformerConfig
from keyformer_evaluation.studies.measures import Likelihood, OnItems
from keyformer_evaluation.studies.pictures import Figure
from keyformer_evaluation.studies.sizes import size_curves
from keyformer_evaluation.studies.study import KINDS, Panel, Results, Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Labels, Row, Steps, plain
from keyformer_evaluation.studies.tables import (
    LOSSES,
    compared_metric,
    difference,
    gain,
    print_columns,
    print_tables,
)
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.data import TASKS, Item, load_items
from keyformer_evaluation.tasks.flags import Parser
from tiny.corpus import document

BASELINES = ("window", "h2o", "keyformer")
SIZES = (20, 30, 50)
SEARCHED_AT = 30
SEARCH_DOCUMENTS = range(1000, 1040)
"""Of the corpus, held out of training and of the reported documents."""

FORGETTING = (1.0, 0.99, 0.95)
NORMALIZE = ("sum", "mean")
RECENT = (30, 60, 80)
SOFTMAX = (("none", 2.0, 2.0), ("none", 0.5, 0.5), ("gumbel", 1.0, 2.0))
"""Noise and the temperature's two ends; first all is searched with no noise and 1."""

KEPT, FINALISTS = 3, 2
"""Settings that go on to the search over ``SOFTMAX``, and from there to the report."""


def more_flags(parser: Parser) -> None:
    """Documents to search on."""
    parser.set_defaults(task=list(TASKS))
    parser.add_argument(
        "--search_path",
        nargs="+",
        type=Path,
        help="one a task: documents to choose settings on, others than those of --dataset_path"
        " (default: of the corpus)",
    )


def main(argv: Sequence[str] | None = None) -> Steps:
    """Search, measure, say whether there is one, write."""
    study = Study("beyond", __doc__, argv, PICTURES, more_flags=more_flags)
    searched = search_items(study)
    base = KeyformerConfig.preset("h2o", kv_cache=SEARCHED_AT)
    grid = [
        replace(base, forgetting=forgetting, normalize=normalize, recent=recent)
        for forgetting, normalize, recent in product(FORGETTING, NORMALIZE, RECENT)
    ]
    if study.flags.quick:
        grid = grid[::6]
    rivals = baselines(SEARCHED_AT)
    panels = measures(study, searched)
    seed = study.flags.seeds[:1]
    first = yield from study.measure([*rivals, *map(setting, grid)], panels, seed)
    best = ranked(first, len(rivals))[:KEPT]
    softmax = [
        setting(replace(of.config, noise=noise, tau_init=tau_init, tau_end=tau_end))
        for of in best
        for noise, tau_init, tau_end in SOFTMAX
    ]
    second = yield from study.measure([*rivals, *best, *softmax], panels, seed)
    finalists = ranked(second, len(rivals))[:FINALISTS]

    cells = [Cell(labels("full", KeyformerConfig.preset("full")), KeyformerConfig.preset("full"))]
    for size in SIZES:
        cells += baselines(size)
        cells += [
            setting(replace(of.config, kv_cache=float(size)), described(of.config))
            for of in finalists
        ]
    results = yield from study.measure(cells, measures(study, study.items))
    print_tables(results)
    study.differences = verdict(results, [described(of.config) for of in finalists], searched)
    study.write(results)


def search_items(study: Study) -> dict[str, list[Item]]:
    """By task, the documents that settings are chosen on."""
    flags = study.flags
    if flags.search_path:
        paths = study.by_task("search_path")
        return {task: load_items(path, TASKS[task]) for task, path in paths.items()}
    if flags.dataset_path:
        raise InputError(
            "--dataset_path needs --search_path: other documents to choose settings on"
        )
    found = {}
    for task in flags.task:
        documents = [document("eval", index, kind=KINDS[task]) for index in SEARCH_DOCUMENTS]
        found[task] = study.sample(task, documents) if flags.quick else documents
    return found


def measures(study: Study, items: dict[str, list[Item]]) -> dict[Panel, OnItems]:
    """What --measure says, and of the first task's documents the likelihood of continued text."""
    found = study.measures(items=items)
    task = study.flags.task[0]
    continued = study.measures(Likelihood, {task: items[task]})
    found |= {(model, "continuation"): of for (model, _), of in continued.items()}
    return dict(sorted(found.items(), key=lambda entry: study.models.index(entry[0][0])))


def labels(method: str, config: KeyformerConfig) -> Labels:
    """A row's, of any method."""
    size = "" if method == "full" else plain(config.kv_cache)
    names = ("forgetting", "normalize", "recent", "noise", "tau_init", "tau_end")
    scored = config.needs_scores
    told = {name: plain(getattr(config, name)) if scored else "" for name in names}
    return {"method": method, "kv_cache": size, **told}


def setting(config: KeyformerConfig, name: str = "setting") -> Cell:
    """A cell of the search."""
    return Cell(labels(name, config), config)


def baselines(size: float) -> list[Cell]:
    """What has to be beaten at a size of the cache."""
    configs = [(name, KeyformerConfig.preset(name, kv_cache=float(size))) for name in BASELINES]
    return [Cell(labels(name, config), config) for name, config in configs]


def ranked(results: Results, rivals: int) -> list[Cell]:
    """Settings by their worst comparison with any of the first rows, in standard errors.

    Those that are one of the first rows themselves are left out.
    """
    worst: dict[int, float] = {}
    for rows in results.values():
        for number, row in enumerate(rows[rivals:]):
            least = min(gain(row, rival, in_errors=True) for rival in rows[:rivals])
            worst[number] = min(worst.get(number, math.inf), least)
    rows = next(iter(results.values()))
    known = [row.config for row in rows[:rivals]]
    order = sorted(worst, key=lambda number: -worst[number])
    best = [rows[rivals + number] for number in order]
    return [Cell(row.labels, row.config) for row in best if row.config not in known]


def beats(row: Row, rival: Row) -> int:
    """1 if better, -1 if worse, 0 if they cannot be told apart, document by document."""
    mean, low, high = difference(row, rival)
    if low <= 0 <= high:
        return 0
    return (1 if mean > 0 else -1) * (-1 if compared_metric(row) in LOSSES else 1)


def described(config: KeyformerConfig) -> str:
    """A setting's name in tables and figures: what distinguishes it from H2O."""
    name = f"forgetting {config.forgetting:g}, {config.normalize}, recent {config.recent:g}"
    if (config.noise, config.tau_init, config.tau_end) != ("none", 1, 1):
        name += f", {config.noise} {config.tau_init:g} to {config.tau_end:g}"
    return name


def verdict(results: Results, settings: list[str], searched: dict[str, list[Item]]) -> list[Labels]:
    """Print how often each finalist beats the baselines, and whether one always does."""
    counts = ", ".join(f"{len(of)} of {task}" for task, of in searched.items())
    print(
        f"\nSettings were chosen at {SEARCHED_AT} % of the cache on other documents ({counts})."
        f" Comparisons with {', '.join(BASELINES)} over models, tasks and sizes:"
    )
    names = ("better", "cannot be told apart", "worse")
    counted: list[Labels] = []
    winners = []
    for name in settings:
        outcomes = [
            beats(row, rival)
            for rows in results.values()
            for row in rows
            if row.labels["method"] == name
            for rival in rows
            if rival.labels["method"] in BASELINES
            and rival.labels["kv_cache"] == row.labels["kv_cache"]
        ]
        counts_of = {of: outcomes.count(which) for of, which in zip(names, (1, 0, -1), strict=True)}
        counted.append({"setting": name, **counts_of})
        if all(outcome == 1 for outcome in outcomes):
            winners.append(name)
    print_columns([[*counted[0]], *([str(value) for value in line.values()] for line in counted)])
    if winners:
        print(f"{'; '.join(winners)}: better than all of them everywhere.")
    else:
        print("No setting beats all of them everywhere: there is no preset to be made of one.")
    return counted


def picture(written: Written) -> Figure:
    """Every method over the size of the cache."""
    title = "Is one score best everywhere? Two settings beside the known methods"
    names = {
        row.labels["method"]: named(row.labels)
        for rows in written.results.values()
        for row in rows
        if row.labels["method"] not in ("full", *BASELINES)
    }
    return size_curves(written, title, "settings chosen on other documents", names=names)


def named(of: Labels) -> str:
    """A setting, for who has not read what distinguishes it from H2O."""
    forgotten = "" if of["forgetting"] == 1 else f", forgetting {of['forgetting']}"
    noise = "no noise" if of["noise"] == "none" else f"{of['noise']} noise"
    warm = " to ".join(dict.fromkeys(str(of[name]) for name in ("tau_init", "tau_end")))
    ranked = f"{of['normalize']} of attention{forgotten}, {of['recent']} % recent"
    return f"{ranked}, {noise}, temperature {warm}"


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
