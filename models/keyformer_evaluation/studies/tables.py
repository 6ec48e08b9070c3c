"""Tables on the terminal: intervals, which of them overlap, differences, the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from keyformer_evaluation.studies.study import Numbers, Panel, Results
from keyformer_evaluation.studies.sweep import Estimate, Labels, Row, Shown, estimate

NAMES = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bits": "bits per token",
    "nll": "nats per token",
    "agreement": "agreement, %",
    "answered": "answered, %",
    "answer_nll": "the answer's nats per token",
    "accuracy": "accuracy, %",
    "sparsity": "sparsity, %",
    "mass": "attention, %",
}
LOSSES = ("bits", "nll", "answer_nll")
"""The metrics of which less is better."""

COMPARED = ("rouge2", "bits", "nll", "accuracy", "agreement", "answered", "answer_nll")
"""The metrics by which methods are compared; of a row, the one that it has."""

MINUS = "_minus_"
"""Between a metric and what a row's difference in it is to."""

NOTHING: Estimate = (math.nan, math.nan, math.nan)

PUBLISHED = ("rouge2", "accuracy")
"""Those that the paper compares by."""


def compared_metric(row: Shown) -> str | None:
    """By which metric a row is compared with others; None if by none."""
    return next((metric for metric in COMPARED if metric in row.values), None)


def digits_of(metric: str) -> int:
    """How many are printed after the point, of a metric or a difference in it."""
    return 3 if metric.split(MINUS)[0] in LOSSES else 2


def spanned(value: Estimate, digits: int, sign: str = "") -> str:
    """A mean with its interval."""
    mean, low, high = (f"{number:{sign}.{digits}f}" for number in value)
    return f"{mean} ({low} to {high})"


def print_tables(results: Results, published: Mapping[Panel, Numbers] | None = None) -> None:
    """For each panel its rows: labels, metrics with intervals, overlaps, the paper's numbers."""
    for (model, task), rows in results.items():
        compared = compared_metric(rows[0])
        known = (published or {}).get((model, task), {}) if compared in PUBLISHED else {}
        print(f"\n{model}, {task}: mean and 95 % interval")
        metrics = [NAMES.get(metric, metric.replace("_", " ")) for metric in rows[0].values]
        lines = [[*rows[0].labels, "seeds", *metrics]]
        groups = [""] * len(rows)
        if compared is not None:
            print(f"rows with a letter in common have overlapping intervals of {NAMES[compared]}")
            lines[0].append("overlap")
            groups = alike(rows, compared)
        if known:
            several = len(next(iter(known.values()))) > 1
            of = "ROUGE-1 / 2 / L" if several else NAMES[compared or ""]
            lines[0].append(f"paper: {of}")
        for row, letters in zip(rows, groups, strict=True):
            line = [str(value) for value in row.labels.values()] + [str(row.seeds)]
            line += [
                "" if math.isnan(value[0]) else spanned(value, digits_of(metric))
                for metric, value in row.values.items()
            ]
            numbers = known.get(tuple(row.labels.values()), ())
            lines.append([*line, letters, " / ".join(f"{number:.2f}" for number in numbers)])
        print_columns(lines)


def print_columns(lines: Sequence[Sequence[str]]) -> None:
    """Lines of cells, the first of them heads, in aligned columns."""
    heads = lines[0]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=False))
        print("  ".join(padded).rstrip())


def alike(rows: Sequence[Row], metric: str) -> list[str]:
    """For each row letters: two rows share one exactly where their intervals overlap."""
    spans = [row.values[metric][1:] for row in rows]
    groups: list[set[int]] = []
    # A largest set of intervals that all overlap has one of their lower ends in common.
    for low, _ in sorted(spans, reverse=True):
        group = {i for i, (a, b) in enumerate(spans) if a <= low <= b}
        if not any(group <= other for other in groups):
            groups = [other for other in groups if not other <= group] + [group]
    return [
        "".join(_letter(g) for g, group in enumerate(groups) if i in group)
        for i in range(len(rows))
    ]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else chr(ord("A") + number - 26)


def difference(first: Row, second: Row, metric: str | None = None) -> Estimate:
    """The mean of first - second over the items, and its interval: items are paired.

    Parameters
    ----------
    metric
        Default: the one that rows are compared by.
    """
    metric = metric or compared_metric(first) or ""
    return estimate(first.per_item[metric] - second.per_item[metric])


def gain(row: Row, rival: Row, in_errors: bool = False) -> float:
    """How much better a row is than another, in the metric compared by or in standard errors."""
    mean, low, high = difference(row, rival)
    sign = -1 if compared_metric(row) in LOSSES else 1
    return sign * mean / (max((high - low) / 3.92, 1e-9) if in_errors else 1)


def with_differences(results: Results, rivals: Sequence[str]) -> Results:
    """Rows with, for each rival, how far they are above that method's row of the same size.

    The mean of the paired differences with its interval, in each metric that rows are compared by;
    NaN where there is no such row.
    """
    found: Results = {}
    for panel, rows in results.items():
        by_method = {(row.labels["method"], row.labels["kv_cache"]): row for row in rows}
        found[panel] = []
        for row in rows:
            values = dict(row.values)
            for metric, name in product(filter(row.values.__contains__, COMPARED), rivals):
                rival = by_method.get((name, row.labels["kv_cache"]), by_method.get((name, "")))
                found_in = difference(row, rival, metric) if rival else NOTHING
                values[f"{metric}{MINUS}{name}"] = found_in
            found[panel].append(replace(row, values=values))
    return found


def print_differences(
    results: Results,
    question: str,
    first: Callable[[Row], bool],
    second: Callable[[Row], bool],
    metric: str | None = None,
) -> list[Labels]:
    """In each panel, by how much the one row that ``first`` picks is above that of ``second``.

    Parameters
    ----------
    metric
        Default: the one that rows are compared by.

    Returns
    -------
    list
        What was printed, for the record.
    """
    metric = metric or compared_metric(next(iter(results.values()))[0]) or ""
    print(f"\n{question} ({NAMES[metric]}, mean of paired differences and 95 % interval)")
    lines = [["model", "task", "difference", "so"]]
    found: list[Labels] = []
    for (model, task), rows in results.items():
        (a,), (b,) = (list(filter(pick, rows)) for pick in (first, second))
        mean, low, high = difference(a, b, metric)
        so = "cannot be told apart" if low <= 0 <= high else "more" if mean > 0 else "less"
        if (a.per_item[metric] == b.per_item[metric]).all():
            so = "equal on every document"
        lines.append([model, task, spanned((mean, low, high), digits_of(metric), "+"), so])
        ends = {"difference": mean, "low": low, "high": high}
        rounded = {name: round(number, 4) for name, number in ends.items()}
        asked = {"question": question, "model": model, "task": task, "metric": metric}
        found.append({**asked, **rounded, "so": so})
    print_columns(lines)
    return found


def labelled(**labels: Any) -> Callable[[Row], bool]:
    """Picks the rows that have these labels."""
    return lambda row: labels.items() <= row.labels.items()
