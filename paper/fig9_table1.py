"""Figure 9 and table 1: tokens a second by length and method, four beams, beside the paper's.

Of long texts a stretch of tokens is timed at three lengths and integrated (--stretch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.throughput import longest_text
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.studies.pictures import COLORS, Figure
from keyformer_evaluation.tasks.flags import run_main

METHODS = {"stock": 100.0, "full": 100.0, "h2o": 90.0, "keyformer": 50.0}
"""Engines and their cache in percent of the prompt, as in table 1."""

PUBLISHED = {
    1024: {"full": 24.9, "h2o": 27.8, "keyformer": 32.0},
    2048: {"full": 15.0, "h2o": 20.5, "keyformer": 24.3},
    4096: {"full": 8.3, "h2o": 14.1, "keyformer": 17.0},
}
"""By tokens of the prompt, and as many generated: the paper's, on an A100 with 80 GB."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    speed = Speed(
        "fig9_table1",
        __doc__,
        argv,
        Path(__file__).parent,
        draws=True,
        prompt=(1024, 2048, 4096),
        batch=1,
        beams=4,
        stretch=128,
    )
    longest = max(speed.flags.prompt)
    speed.check_positions(longest_text(longest, longest, speed.flags.stretch))
    speed.draw(picture(speed.write(rows(speed))))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model, length and method."""
    flags = speed.flags
    for bench in speed.benches():
        for prompt in flags.prompt:
            for engine, kv_cache in METHODS.items():
                config = speed.config(engine, kv_cache)
                labels = {"model": bench.shape, "prompt": prompt, "new": prompt, "engine": engine}
                labels |= {"batch": flags.batch, "beams": flags.beams, "kv_cache": kv_cache}
                measured = bench.attempt(
                    bench.generation,
                    config,
                    flags.batch,
                    prompt,
                    prompt,
                    flags.beams,
                    flags.stretch,
                )
                paper = PUBLISHED.get(prompt, {}).get(engine)
                yield labels | measured | {"paper tokens/s": paper}


def picture(done: Sequence[Record]) -> Figure:
    """Tokens a second as multiples of stock transformers'."""
    models = list(dict.fromkeys(row["model"] for row in done))
    figure = Figure(figsize=(0.6 + 4.0 * len(models), 3.4), layout="constrained")
    for ax, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        lengths = list(dict.fromkeys(row["prompt"] for row in done if row["model"] == model))
        for place, engine in enumerate(METHODS):
            speeds = [
                {
                    row["engine"]: row.get("tokens/s", 0.0)
                    for row in done
                    if (row["model"], row["prompt"]) == (model, length)
                }
                for length in lengths
            ]
            heights = [of[engine] / of["stock"] if of["stock"] else 0.0 for of in speeds]
            at = [number + 0.2 * (place - 1.5) for number in range(len(lengths))]
            ax.bar(at, heights, 0.18, label=engine, color=COLORS.get(engine, "#9467bd"))
        ax.set_xticks(range(len(lengths)), [f"{n} + {n}" for n in lengths])
        ax.set_title(model)
        ax.set_ylabel("times stock's tokens a second")
        ax.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run_main(main)
