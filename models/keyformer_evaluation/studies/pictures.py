"""Figures with one panel a model and task, drawn from rows and their intervals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from keyformer_evaluation.studies.study import Results
from keyformer_evaluation.studies.sweep import Row
from keyformer_evaluation.studies.tables import LOSSES, NAMES, compared_metric, digits_of
from keyformer_evaluation.tasks.flags import stop_without

try:
    from matplotlib import rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    stop_without(error, extra="paper")

rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "svg.hashsalt": "keyformer",
    }
)

COLORS = {
    "full": "#222222",
    "window": "#7f7f7f",
    "dilated_window": "#bcbd22",
    "streaming_llm": "#8c564b",
    "key": "#e377c2",
    "h2o": "#1f77b4",
    "keyformer": "#d62728",
    "recall": "#2ca02c",
}
"""Of each method, in every figure."""

PALETTE = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#bcbd22")
"""Of what is no method."""

LEAST_SPAN = (5.0, 0.1)
"""Of a grid's colours, in percent and of losses, so that small differences look small."""


def colors_of(methods: Iterable[str]) -> dict[str, str]:
    """Of each method its own, of what is none one of those left, in their order."""
    left = itertools.cycle(color for color in PALETTE if color not in COLORS.values())
    return {method: COLORS.get(method) or next(left) for method in dict.fromkeys(methods)}


def panels(
    results: Results, title: str, ylabel: str | None = None, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a model and task, in the order of ``results``.

    Parameters
    ----------
    ylabel
        Default: the metric that rows are compared by.
    columns
        Default: one a task, or up to three.
    """
    if ylabel is None:
        ylabel = NAMES[_metric(next(iter(results.values()))[0])]
    count = len(results)
    tasks = len({task for _, task in results})
    columns = columns or (tasks if tasks > 1 else min(count, 3))
    lines = -(-count // columns)
    size = (max(5.4, 0.6 + 4.0 * columns), 0.5 + 3.1 * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    for number, (ax, (model, task)) in enumerate(zip(axes, results, strict=False)):
        ax.set_title(f"{model.removesuffix('-keyformer')}, {task}")
        if number % columns == 0:
            ax.set_ylabel(ylabel)
    figure.suptitle(title, fontsize=12)
    return figure, axes[:count]


def _metric(row: Row) -> str:
    """The one that rows are compared by."""
    return compared_metric(row) or ""


def draw_line(
    ax: Axes, rows: Sequence[Row], x: str, label: str, color: str, metric: str | None = None
) -> None:
    """A metric, by default the one compared by, against a label, its interval shaded."""
    metric = metric or _metric(rows[0])
    at = [row.labels[x] for row in rows]
    mean, low, high = zip(*(row.values[metric] for row in rows), strict=True)
    ax.plot(at, mean, marker="o", markersize=4, label=label, color=color)
    ax.fill_between(at, low, high, alpha=0.15, color=color, linewidth=0)


def method_bars(results: Results, title: str) -> Figure:
    """A panel each: every row's metric with its number and interval, names at the left."""
    figure, axes = panels(results, title, ylabel="")
    for number, (ax, rows) in enumerate(zip(axes, results.values(), strict=True)):
        names = [[str(value).replace("_", " ") for value in row.labels.values()] for row in rows]
        for place, row in enumerate(rows):
            metric = _metric(row)
            mean, low, high = row.values[metric]
            color = COLORS.get(str(row.labels.get("method")), PALETTE[place % len(PALETTE)])
            ax.barh(place, mean, color=color, alpha=0.85, height=0.7)
            ax.plot([low, high], [place, place], color="black", linewidth=1.2)
            ax.annotate(
                f"{mean:.{digits_of(metric) - 1}f}",
                (high, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        shown = [", ".join(filter(None, name)) for name in names]
        ax.set_yticks(range(len(rows)), shown if number == 0 else [""] * len(rows))
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.margins(x=0.15)
        if metric not in LOSSES:
            ax.set_xlim(left=0)
        else:  # which differ by little: from somewhat below the least
            ax.set_xlim(left=0.95 * min(row.values[metric][1] for row in rows))
        ax.set_xlabel(NAMES[metric])
    return figure


def draw_level(ax: Axes, full: Row, metric: str | None = None) -> None:
    """Full attention, and 99 % of it, the bar that MLPerf sets."""
    metric = metric or _metric(full)
    level = full.values[metric][0]
    ax.axhline(level, color=COLORS["full"], linewidth=1.2, label="full")
    if metric not in LOSSES:
        bar = 0.99 * level
        ax.axhline(bar, color=COLORS["full"], linewidth=1, linestyle=":", label="99 % of full")


def method_curves(results: Results, x: str, xlabel: str, title: str) -> Figure:
    """A panel each: full attention, the first row, and a line for every other method."""
    figure, axes = panels(results, title, ylabel="")
    for ax, (full, *rows) in zip(axes, results.values(), strict=True):
        metric = _metric(full)
        draw_level(ax, full, metric)
        for method, color in colors_of(row.labels["method"] for row in rows).items():
            of_method = [row for row in rows if row.labels["method"] == method]
            draw_line(ax, of_method, x, method, color, metric)
        ax.set_xlabel(xlabel)
        ax.set_xticks(list(dict.fromkeys(row.labels[x] for row in rows)))
        ax.set_ylabel(NAMES[metric])
        if metric not in LOSSES:
            ax.set_ylim(bottom=0)
    legend_of(figure, axes[0])
    return figure


def draw_grid(
    ax: Axes,
    rows: Sequence[Row],
    x: str,
    y: str,
    span: tuple[float, float] | None = None,
) -> None:
    """The metric that rows are compared by over two labels, as colours and numbers.

    Parameters
    ----------
    span
        What the colours reach over; by default the values there are.
    """
    metric = _metric(rows[0])
    across = list(dict.fromkeys(row.labels[x] for row in rows))
    down = list(dict.fromkeys(row.labels[y] for row in rows))
    found = {(row.labels[y], row.labels[x]): row.values[metric][0] for row in rows}
    values = [[found[b, a] for a in across] for b in down]
    lowest, highest = span or (min(map(min, values)), max(map(max, values)))
    middle, half = (lowest + highest) / 2, max(highest - lowest, LEAST_SPAN[metric in LOSSES]) / 2
    low, high = middle - half, middle + half
    ax.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
    ax.grid(False)
    ax.set_xticks(range(len(across)), [str(a) for a in across])
    ax.set_yticks(range(len(down)), [str(b) for b in down])
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            color = "white" if value < middle else "black"
            ax.text(
                j,
                i,
                f"{value:.{digits_of(metric) - 1}f}",
                ha="center",
                va="center",
                color=color,
                fontsize=8,
            )


def legend_of(figure: Figure, ax: Axes) -> None:
    """One legend for all panels, under them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7))
