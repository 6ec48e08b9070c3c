"""What is asked for after eviction, which the paper does not test: questions, needles, chats.

Articles with questions (``question``), the questions only after the article was evicted
(``later``), a number hidden in articles of many lengths and depths (``needle``), and a question
about a chat's first turn after ten others (``chat``). An answer is right if what the model writes
greedily contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keyformer.config import METHODS
from keyformer.evaluation.data import Item
from keyformer.evaluation.flags import PERCENT, PERCENT_ABOVE_0, Parser, whole
from keyformer.evaluation.measures import Answered
from keyformer.evaluation.pictures import draw_grid, method_curves, panels
from keyformer.evaluation.retrieval import chats, load_articles, needles, questions
from keyformer.evaluation.sizes import METHODS as COMPARED
from keyformer.evaluation.sizes import RIVALS, SIZES, cells
from keyformer.evaluation.study import ARTICLES, Results, Study, run_study
from keyformer.evaluation.sweep import Row, Steps, estimate
from keyformer.evaluation.tables import print_tables, with_differences

MAPPED = (50, 20)
"""Sizes of the cache, in percent, for which needles are drawn by length and depth."""


def more_flags(parser: Parser) -> None:
    """What is compared, and on which haystacks."""
    parser.add_argument("--articles", type=Path, default=ARTICLES, help="with questions")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED))
    parser.add_argument(
        "--sizes", nargs="+", type=PERCENT_ABOVE_0, default=list(SIZES), help="of the cache, in %%"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=whole(20), default=[500, 1000, 1500, 2500], help="in words"
    )
    parser.add_argument(
        "--depths", nargs="+", type=PERCENT, default=[0, 25, 50, 75, 100], help="in %%"
    )
    parser.add_argument("--needles", type=whole(1), default=5, help="of each length and depth")


def main(argv: Sequence[str] | None = None) -> Steps:
    """Ask, print, write."""
    study = Study("retrieval", __doc__, argv, more_flags=more_flags)
    flags = study.flags
    articles = study.sample("summarization", load_articles(flags.articles))
    places = [(length, depth) for length in flags.lengths for depth in flags.depths]
    if study.flags.quick:
        places = places[:1]
    asked: dict[str, list[Item]] = {
        "question": questions(articles, later=False),
        "later": questions(articles, later=True),
        "needle": [one for place in places for one in needles(articles, *place, flags.needles)],
        "chat": chats(articles),
    }
    results = yield from study.measure(
        cells(flags.methods, flags.sizes), study.probes(Answered, asked)
    )
    results = with_differences(results, RIVALS)
    print_tables(results)
    title = "Answers to questions after eviction"
    study.write(results, method_curves(results, "kv_cache", "cache, % of the prompt", title))
    needle_rows = {model: rows for (model, task), rows in results.items() if task == "needle"}
    for model, rows in needle_rows.items():
        mapped = by_place(rows, places)
        if not mapped:
            continue
        figure, axes = panels(mapped, f"Needles found, %: {model}", ylabel="depth, %")
        for ax, of_place in zip(axes, mapped.values(), strict=True):
            draw_grid(ax, of_place, "words", "depth", "answered", limits=(0, 100))
            ax.set_xlabel("haystack, words")
        study.draw(figure, f"-needle-{model}")


def by_place(rows: Sequence[Row], places: Sequence[tuple[int, float]]) -> Results:
    """Needles found at each length and depth; a panel for each method and mapped size."""
    found: Results = {}
    for row in rows:
        method, size = row.labels["method"], row.labels["kv_cache"]
        if method != "full" and size not in MAPPED:
            continue
        of = row.per_item["answered"].reshape(len(places), -1)
        cells = [
            Row({"words": words, "depth": depth}, row.config, row.seeds, {}, {"answered": score(at)})
            for (words, depth), at in zip(places, of, strict=True)
        ]
        for shown in MAPPED if method == "full" else (size,):
            found[method, f"{shown} % of the cache"] = cells
    order = {method: number for number, method in enumerate(dict.fromkeys(m for m, _ in found))}
    return dict(sorted(found.items(), key=lambda panel: (order[panel[0][0]], -len(panel[0][1]))))


def score(values: np.ndarray) -> tuple[float, float, float]:
    """The mean with its interval."""
    return estimate(values)


if __name__ == "__main__":
    run_study(main)
