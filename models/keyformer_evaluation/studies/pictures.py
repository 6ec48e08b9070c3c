"""One style for all figures: how each method looks, a page with a title, its setting and a legend.

What is drawn comes from a record alone, see :mod:`.written`.
"""

from __future__ import annotations

import itertools
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from keyformer_evaluation.studies.sweep import Estimate, Shown
from keyformer_evaluation.studies.tables import LOSSES, NAMES, compared_metric, digits_of
from keyformer_evaluation.studies.written import Panel, Written
from keyformer_evaluation.tasks.flags import stop_without

try:
    from matplotlib import rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ModuleNotFoundError as error:
    stop_without(error, extra="paper")

rcParams.update(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10.5,
        "font.size": 10,
        "grid.alpha": 0.25,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.fonttype": "none",  # text stays text: small, and found by a search
        "svg.hashsalt": "keyformer",
    }
)

WIDTH = 9.0
"""Of every figure, in inches: a README and a slide show it without making its text small."""


@dataclass(frozen=True)
class Look:
    """How a method is drawn; colours are those of Okabe and Ito, which all eyes tell apart."""

    label: str
    color: str
    marker: str
    line: Any = "-"


BLACK = "#000000"
LOOKS = {
    "full": Look("full cache", BLACK, "*"),
    "stock": Look("transformers", "#E69F00", "s", "--"),
    "static": Look("transformers compiled", "#F0E442", "D", "--"),
    "window": Look("window", "#999999", "s", (0, (4, 1.5))),
    "dilated_window": Look("dilated window", "#B0A030", "<", ":"),
    "streaming_llm": Look("StreamingLLM", "#CC79A7", "D", "-."),
    "key": Look("key tokens alone", "#56B4E9", "P", (0, (1, 1))),
    "h2o": Look("H2O", "#0072B2", "o"),
    "keyformer": Look("Keyformer", "#D55E00", "^", (0, (5, 1))),
    "recall": Look("recall (ours)", "#009E73", "p"),
    "observed": Look("observed (as SnapKV)", "#882255", "v", "--"),
    "leverage": Look("leverage", "#6B4C9A", "h", ":"),
}
"""Of each method and rule, and of transformers' own, in every figure."""

OTHERS = (("#332288", "X"), ("#999933", "d"), ("#88CCEE", ">"), ("#661100", "H"))
"""Of what is none of them, in order."""

MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct", "mpt-7b": "MPT-7B", "llama-3-8b": "Llama-3-8B"}
"""Names that differ from those of the folder or shape."""

PANELS = {
    "summarization": "summaries",
    "conversation": "dialogues",
    "rouge": "summaries it writes",
    "reference": "reference summaries",
    "agreement": "the full cache's summaries",
    "continued": "how a document goes on",
    "continuation": "continued text",
    "question": "questions asked with the article",
    "later": "questions asked after eviction",
    "ahead": "questions, others read ahead",
    "needle": "needle asked with the text",
    "needle later": "needle asked after eviction",
    "needle ahead": "needle, questions read ahead",
    "chat": "first turn of a chat, asked later",
}
"""What a panel shows, by its task in the record."""

DOT, NO_BREAK = " · ", "\xa0"
LESS = "\n(less is better)"
INTERVALS = "thin lines: 95 % intervals"
ASIDE = "marks at one place stand side by side"

LEAST_SPAN = (5.0, 0.1)
"""Of a grid's colours, in percent and of losses, so that small differences look small."""


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """Of each method its own, of what is none one of those left, in their order."""
    left = itertools.cycle(OTHERS)
    return {
        name: LOOKS.get(name) or Look(name.replace("_", " "), *next(left))
        for name in dict.fromkeys(methods)
    }


def model_name(model: str) -> str:
    """As a figure has it."""
    return MODELS.get(model, model.removesuffix("-keyformer"))


def axis_name(metric: str) -> str:
    """A metric with its unit, and which way is better where that is down."""
    return NAMES[metric].replace(", %", " (%)") + (LESS if metric in LOSSES else "")


def setting(written: Written, *more: str, last: str = INTERVALS) -> str:
    """What is measured on what, and how: a figure's second line."""
    record, results = written.record, written.results
    metrics = {metric for rows in results.values() for row in rows for metric in row.values}
    models = {model for model, _ in results}
    of_task = record.get("items", {})
    counted = [of_task[task] for _, task in results if task in of_task]
    counted = counted or [*of_task.values()] * (len(of_task) == 1)
    items = sorted({min(counted), max(counted)}) if counted else []
    of = "".join(f" of {name}" for name in [", ".join(_datasets(record["command"]))] if name)
    seeds = max(row["seeds"] for row in written.rows)
    generated = metrics & {"rouge2", "answered"}
    told = [
        *(model_name(model) for model in models if len(models) == 1),
        *more,
        *([f"{' to '.join(map(str, items))} items{of} a panel"] if items else []),
        *(["greedy" if record["beam"] == 1 else f"{record['beam']} beams"] if generated else []),
        *([f"{seeds} seeds where noise is drawn"] if seeds > 1 else []),
        f"{record['dtype']}, {record['device']}",
        *([last] if last else []),
    ]
    return DOT.join(told)


def _datasets(command: str) -> list[str]:
    """The names of those that a command is given."""
    words = shlex.split(command)
    given = words[words.index("--dataset_path") + 1 :] if "--dataset_path" in words else []
    return [Path(word).stem for word in itertools.takewhile(lambda word: word[:2] != "--", given)]


def page(
    title: str,
    about: str,
    lines: int = 1,
    columns: int = 1,
    looks: Iterable[Look] = (),
    height: float = 2.5,
    width: float = WIDTH,
    **more: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure with its title, its setting, a legend under it, and a grid of axes.

    Parameters
    ----------
    about
        The second line, in smaller letters.
    looks
        Of the legend.
    height
        Of a line of axes, in inches.
    **more
        Of ``Figure.subplots``.
    """
    about = "\n".join(_filled(line, int(14.2 * width)) for line in about.splitlines())
    looks = list(dict.fromkeys(looks))
    across = _across([0.7 + 0.075 * len(look.label) for look in looks], width)
    head = 0.45 + 0.18 * len(about.splitlines())
    foot = 0.1 + 0.24 * -(-len(looks) // across)
    tall = head + height * lines + foot
    figure = Figure(figsize=(width, tall), layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0.005, foot / tall, 0.99, 1 - (head + foot) / tall), hspace=0.06)
    figure.text(0.012, 1 - 0.09 / tall, title, size=13, weight="bold", va="top")
    figure.text(0.012, 1 - 0.37 / tall, about, size=9, color="#444444", va="top", linespacing=1.25)
    if looks:
        figure.legend(handles=[_key(look) for look in looks], loc="lower center", ncols=across)
    return figure, figure.subplots(lines, columns, squeeze=False, **more)


def _filled(line: str, width: int) -> str:
    """A line of parts as several of that width, broken between parts where these are short."""
    parts = (part.replace(" ", NO_BREAK) if len(part) < 60 else part for part in line.split(DOT))
    filled = textwrap.fill(f"{NO_BREAK}· ".join(parts), width)
    return filled.replace(f"{NO_BREAK}·\n", "\n")


def _across(widths: Sequence[float], room: float) -> int:
    """Into how many columns entries of a legend go, filled one column after the other."""
    for columns in range(len(widths), 1, -1):
        if sum(max(of) for of in np.array_split(np.array(widths), columns)) <= room:
            return columns
    return 1


def _key(look: Look) -> Line2D:
    """A look's entry in a legend."""
    return Line2D(
        [], [], label=look.label, color=look.color, marker=look.marker, linestyle=look.line
    )


def panels(
    written: Written,
    title: str,
    about: str,
    looks: Iterable[Look] = (),
    columns: int | None = None,
    height: float = 2.5,
) -> tuple[Figure, dict[Panel, Axes]]:
    """A page with axes for each model and task: a column each model, or each task of a model alone.

    Parameters
    ----------
    columns
        Instead, all in order in so many.
    """
    results = written.results
    models, tasks = (list(dict.fromkeys(names)) for names in zip(*results, strict=True))
    order = list(results)
    if columns is None and len(models) > 1 and len(order) == len(models) * len(tasks):
        columns = len(models)
        order = [(model, task) for task in tasks for model in models]
    columns = columns or (2 if len(order) in (2, 4) else min(3, len(order)))
    lines = -(-len(order) // columns)
    figure, grid = page(title, about, lines, columns, looks, height)
    axes = dict(zip(order, grid.flat, strict=False))
    for spare in grid.flat[len(order) :]:
        spare.set_visible(False)
    for (model, task), ax in axes.items():
        shown = PANELS.get(task, task.removeprefix("tiny_"))
        named = [model_name(model)] * (len(models) > 1) + [shown] * (len(tasks) > 1)
        ax.set_title(", ".join(named), loc="left")
    return figure, axes


def left_of(axes: Mapping[Panel, Axes]) -> list[Axes]:
    """The axes that begin a line."""
    return [ax for ax in axes.values() if ax.get_subplotspec().is_first_col()]  # type: ignore[union-attr]


def _metric(row: Shown) -> str:
    """The one that rows are compared by."""
    return compared_metric(row) or ""


def draw_line(
    ax: Axes,
    rows: Sequence[Shown],
    x: str,
    look: Look,
    metric: str | None = None,
    aside: float = 0.0,
) -> None:
    """A metric, by default the one compared by, against a label, with its interval.

    Parameters
    ----------
    aside
        How far to the right of its place, that no mark hides another.
    """
    metric = metric or _metric(rows[0])
    at = [row.labels[x] + aside for row in rows]
    mean, low, high = (
        np.array(of) for of in zip(*(row.values[metric] for row in rows), strict=True)
    )
    ax.errorbar(
        at,
        mean,
        (mean - low, high - mean),
        color=look.color,
        marker=look.marker,
        linestyle=look.line,
        markersize=5.5,
        markeredgewidth=0,
        elinewidth=1.3,
    )


def draw_level(ax: Axes, full: Shown, metric: str) -> None:
    """Full attention, and of what is no loss 99 % of it, the bar that MLPerf sets."""
    level, low, high = full.values[metric]
    look = LOOKS["full"]
    ax.axhspan(low, high, color=look.color, alpha=0.08, linewidth=0)
    ax.axhline(level, color=look.color)
    if metric not in LOSSES:
        ax.axhline(0.99 * level, color=look.color, linewidth=1, linestyle=":")


FULL = replace(LOOKS["full"], marker="")
LEVELS = (FULL, Look("99 % of it", BLACK, "", ":"))
"""What :func:`draw_level` draws, as a legend has it."""


def method_curves(
    written: Written,
    x: str,
    xlabel: str,
    title: str,
    *about: str,
    names: Mapping[str, str] | None = None,
) -> Figure:
    """A panel each: full attention, the first row, and a line for every other method.

    Parameters
    ----------
    names
        Of methods that have none.
    """
    results = written.results
    methods = dict.fromkeys(row.labels["method"] for _, *rows in results.values() for row in rows)
    looks = looks_of(methods)
    looks |= {name: replace(looks[name], label=label) for name, label in (names or {}).items()}
    lossless = any(_metric(full) not in LOSSES for full, *_ in results.values())
    figure, axes = panels(
        written,
        title,
        setting(written, *about, last=f"{INTERVALS} · {ASIDE}"),
        [*LEVELS[: 1 + lossless], *looks.values()],
    )
    for panel, ax in axes.items():
        full, *rows = results[panel]
        metric = _metric(full)
        draw_level(ax, full, metric)
        places = list(dict.fromkeys(row.labels[x] for row in rows))
        least = min(b - a for a, b in pairwise(sorted(places))) if places[1:] else 1
        step = min(0.5 * least / len(looks), 0.02 * (max(places) - min(places)))
        for number, (method, look) in enumerate(looks.items()):
            of_method = [row for row in rows if row.labels["method"] == method]
            draw_line(ax, of_method, x, look, metric, step * (number - (len(looks) - 1) / 2))
        ax.set_xlabel(xlabel)
        ax.set_xticks(places)
        ax.set_ylabel(axis_name(metric))
        if metric not in LOSSES:
            ax.set_ylim(bottom=-0.02 * ax.get_ylim()[1])
    return figure


def draw_bars(
    ax: Axes,
    places: Sequence[float],
    shown: Sequence[float | tuple[float, float, float]],
    look: Look,
    width: float,
    digits: int | None = None,
) -> None:
    """Upright bars, with intervals where there are any, and their numbers where digits are told."""
    spans = [of if isinstance(of, tuple) else (of, of, of) for of in shown]
    mean, low, high = zip(*spans, strict=True)
    ax.bar(places, mean, width, color=look.color)
    ax.vlines(places, low, high, color=_over(look), linewidth=1.3)
    for place, top, value in zip(places, high, mean, strict=True):
        if digits is not None:
            number = f"{value:.{digits}f}"
            ax.annotate(number, (place, top), (0, 2), **_POINTS, ha="center", size=9)


def _over(look: Look) -> str:
    """What is seen on a bar."""
    return "#888888" if look.color == BLACK else BLACK


_POINTS: dict[str, Any] = {"textcoords": "offset points"}


def method_bars(
    written: Written, title: str, *about: str, names: Mapping[str, str] | None = None
) -> Figure:
    """A panel each: every row's metric with its number and interval, names at the left.

    What has a zero is a bar from there; losses, of which small differences count, are dots.

    Parameters
    ----------
    names
        Of labels' values; default: the methods' and the values themselves.
    """
    results = written.results
    rows = next(iter(results.values()))
    names = {name: look.label for name, look in LOOKS.items()} | dict(names or {})
    named = [
        [names.get(str(of), str(of).replace("_", " ")) for of in row.labels.values()]
        for row in rows
    ]
    told, blank = [", ".join(filter(None, of)) for of in named], [""] * len(rows)
    height = 0.75 + 0.36 * len(rows)
    figure, axes = panels(written, title, setting(written, *about), height=height)
    for panel, ax in axes.items():
        of_panel = results[panel]
        metric = _metric(of_panel[0])
        looks = [
            replace(LOOKS.get(str(row.labels.get("method")), LOOKS["keyformer"]), label=name)
            for row, name in zip(of_panel, told if ax in left_of(axes) else blank, strict=True)
        ]
        values = [row.values[metric] for row in of_panel]
        draw_rows(ax, looks, values, digits_of(metric) - 1, bars=metric not in LOSSES)
        ax.set_xlabel(axis_name(metric).replace("\n", " "))
    return figure


def draw_rows(
    ax: Axes, looks: Sequence[Look], shown: Sequence[Estimate], digits: int, bars: bool = True
) -> None:
    """Values from the top down, each with its name, its number and its interval.

    Parameters
    ----------
    bars
        From zero; or dots on an axis that need not have it.
    """
    for place, (look, (mean, low, high)) in enumerate(zip(looks, shown, strict=True)):
        if bars:
            ax.barh(place, mean, color=look.color, height=0.7)
            ax.plot([low, high], [place, place], color=_over(look), linewidth=1.3)
        else:
            ax.plot([low, high], [place, place], color=look.color, linewidth=2)
            ax.plot(mean, place, look.marker, color=look.color, markersize=8)
        number = f"{mean:.{digits}f}"
        ax.annotate(number, (max(high, mean), place), (5, 0), **_POINTS, va="center", size=10)
    ax.set_yticks(range(len(looks)), [look.label for look in looks])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(looks) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.margins(x=0.22)
    if bars:
        ax.set_xlim(left=0)


def draw_grid(
    ax: Axes,
    rows: Sequence[Shown],
    x: str,
    y: str,
    span: tuple[float, float] | None = None,
    digits: int | None = None,
) -> None:
    """The metric that rows are compared by over two labels, as colours and numbers.

    Parameters
    ----------
    span
        What the colours reach over; by default the values there are.
    digits
        After the point; by default one fewer than in tables.
    """
    metric = compared_metric(rows[0]) or ""
    digits = digits_of(metric) - 1 if digits is None else digits
    across = list(dict.fromkeys(row.labels[x] for row in rows))
    down = list(dict.fromkeys(row.labels[y] for row in rows))
    found = {(row.labels[y], row.labels[x]): row.values[metric][0] for row in rows}
    values = [[found[b, a] for a in across] for b in down]
    lowest, highest = span or (min(map(min, values)), max(map(max, values)))
    middle, half = (lowest + highest) / 2, max(highest - lowest, LEAST_SPAN[metric in LOSSES]) / 2
    ax.imshow(values, cmap="cividis", aspect="auto", vmin=middle - half, vmax=middle + half)
    ax.grid(False)
    ax.set_xticks(range(len(across)), [str(a) for a in across])
    ax.set_yticks(range(len(down)), [str(b) for b in down])
    for i, j in itertools.product(range(len(down)), range(len(across))):
        color = "white" if values[i][j] < middle else "black"
        ax.text(j, i, f"{values[i][j]:.{digits}f}", ha="center", va="center", color=color, size=9)
