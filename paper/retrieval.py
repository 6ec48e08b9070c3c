"""What is asked for, which the paper does not test: questions, needles, chats.

Questions about an article (``question``); a number in one sentence of a haystack made of articles,
at many lengths and depths (``needle``); a question about the first turn of a chat after ten others
(``chat``). Questions and needles are asked with the text, after it was evicted (``later``), and
after it was evicted with questions of the kind that --ahead has, read with it and forgotten
(``ahead``). An answer is right if what the model writes greedily contains it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from keyformer_evaluation.studies.measures import Answered
from keyformer_evaluation.studies.pictures import (
    LOOKS,
    WIDTH,
    Figure,
    draw_grid,
    looks_of,
    model_name,
    page,
    setting,
)
from keyformer_evaluation.studies.sizes import RIVALS, cells, compared_flags, size_curves
from keyformer_evaluation.studies.study import (
    ARTICLES,
    BUNDLED_MODELS,
    ROOT,
    Results,
    Study,
    run_study,
)
from keyformer_evaluation.studies.sweep import Row, Steps, estimate, plain
from keyformer_evaluation.studies.tables import print_tables, with_differences
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.retrieval import chats, load_articles, needles, questions

REAL = ROOT / "models" / "smollm2-135m"
"""What is asked where it is there; the bundled models have not learned to answer."""

QUESTIONS = (
    "What is the number? Who is it? When was it? Where was it? How many? Which one? Why?"
    " What is the name?"
)
"""What is asked ahead."""

MAPPED = (50, 20)
"""Sizes of the cache, in percent, for which needles are drawn by length and depth."""

Place = tuple[int, float]
"""Words of a haystack, and how deep in it the needle is, in percent."""


def more_flags(parser: flag.Parser) -> None:
    """What is asked, of what."""
    compared_flags(parser)
    flag.prompt_flag(parser)
    parser.add_argument("--articles", type=Path, default=ARTICLES, help="with questions")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=flag.whole(20),
        default=[500, 1000, 1500, 2500],
        help="of haystacks, in words",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=flag.PERCENT,
        default=[0, 25, 50, 75, 100],
        help="of needles, in %% of the haystack",
    )
    parser.add_argument("--needles", type=flag.whole(1), default=5, help="of each length and depth")
    parser.add_argument("--max_new_tokens", type=flag.whole(1), default=24, help="of an answer")
    parser.add_argument(
        "--ahead",
        default=QUESTIONS,
        help="asked ahead; '' for none (default: %(default)s)",
    )


def main(argv: Sequence[str] | None = None) -> Steps:
    """Ask, print, write."""
    models = [REAL] if REAL.is_dir() else BUNDLED_MODELS[:1]
    study = Study(
        "retrieval", __doc__, argv, PICTURES, generates=False, models=models, more_flags=more_flags
    )
    flags = study.flags
    articles = study.sample("summarization", load_articles(flags.articles))
    places = [(length, depth) for length in flags.lengths for depth in flags.depths]
    if flags.quick:
        places = [(20, 50.0)]
    asked: dict[str, str | None] = {"": None, "later": ""}
    if flags.ahead:
        asked["ahead"] = flags.ahead
    study.items = {}
    for when, ahead in asked.items():
        study.items[when or "question"] = questions(articles, ahead)
        study.items[f"needle {when}".strip()] = [
            one for at in places for one in needles(articles, *at, flags.needles, ahead)
        ]
    study.items["chat"] = chats(articles)
    measures = study.measures(Answered)
    results = yield from study.measure(cells(flags), measures)
    results = with_differences(results, RIVALS)
    print_tables(results)
    study.write(results)
    mapped = {
        panel: rows
        for model in study.models
        for panel, rows in by_place(model, results[model, "needle"], places).items()
    }
    study.write(mapped, "_needles")


def by_place(model: str, rows: Sequence[Row], places: Sequence[Place]) -> Results:
    """Needles found at each place: a panel for the full cache, and each method at MAPPED sizes."""
    found: Results = {}
    for row in rows:
        size = row.labels["kv_cache"]
        if size not in ("", *MAPPED):
            continue
        of_place = row.per_item["answered"].reshape(len(places), -1)
        found[model, " ".join(filter(None, (row.labels["method"], size and f"{size} %")))] = [
            Row(
                {"words": words, "depth": plain(depth)},
                {"answered": estimate(of)},
                row.config,
                row.seeds,
                {},
            )
            for (words, depth), of in zip(places, of_place, strict=True)
        ]
    return found


def picture(written: Written) -> Figure:
    """Answers by the size of the cache."""
    return size_curves(written, "Answers found in what is left, by the size of the cache")


def needles_picture(written: Written) -> Figure:
    """A line for each model and size, a column for the full cache and for each method."""
    results = written.results
    named = {task: re.fullmatch(r"(.+) (\d+) %", task) for _, task in results}
    methods = looks_of(found[1] for found in named.values() if found)
    sizes = {found[2] for found in named.values() if found} or {""}
    models = dict.fromkeys(model for model, _ in results)
    lines = list(product(models, sorted(sizes, key=lambda size: int(size or 0), reverse=True)))
    needles = written.record["items"]["needle"] // len(next(iter(results.values())))
    figure, grid = page(
        "Needles found (%), by length of the text and depth",
        setting(
            written,
            "asked with the text",
            f"{needles} needles a cell",
            "percent: cache, of the prompt",
            last="",
        ),
        len(lines),
        len(methods) + 1,
        width=max(WIDTH, 1.8 * (len(methods) + 1)),
        sharex=True,
        sharey=True,
    )
    for line, (model, size) in zip(grid, lines, strict=True):
        shown = {
            f"{method} {size} %": f"{look.label}, {size} %" for method, look in methods.items()
        }
        if size == lines[0][1]:  # the full cache stands beside the largest size alone
            shown["full"] = LOOKS["full"].label
        for ax, task in zip(line, shown, strict=False):
            draw_grid(ax, results[model, task], "words", "depth", span=(0, 100), digits=0)
            ax.set_title(shown[task], loc="left", size=9.5)
            ax.tick_params(labelbottom=True, length=0, labelsize=9)
            ax.set_xlabel("words")
        for spare in line[len(shown) :]:
            spare.set_visible(False)
        about = [model_name(model)] * (len(models) > 1)
        line[0].set_ylabel("\n".join([*about, "depth (% of the text)"]))
    return figure


PICTURES = {"": picture, "_needles": needles_picture}


if __name__ == "__main__":
    run_study(main)
