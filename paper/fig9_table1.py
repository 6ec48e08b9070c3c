"""Figure 9 and table 1: tokens a second by length and method, four beams, beside the paper's.

Of long texts a stretch of tokens is timed at three lengths and integrated (--stretch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.throughput import longest_text
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.studies.pictures import LOOKS, Figure, model_name, page
from keyformer_evaluation.studies.written import Written
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
        pictures=PICTURES,
        prompt=(1024, 2048, 4096),
        batch=1,
        beams=4,
        stretch=128,
    )
    longest = max(speed.flags.prompt)
    speed.check_positions(longest_text(longest, longest, speed.flags.stretch))
    speed.write(rows(speed))


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


def picture(written: Written) -> Figure:
    """Tokens a second, of each model; how many times stock transformers' is told above."""
    done, record = written.rows, written.record
    models = list(dict.fromkeys(row["model"] for row in done))
    looks = {engine: replace(LOOKS[engine], marker="s", line="") for engine in METHODS}
    for engine, size in METHODS.items():
        if size < 100:
            looks[engine] = replace(looks[engine], label=f"{looks[engine].label}, {size:g} %")
    figure, (axes,) = page(
        "Tokens a second with beam search, and how many times transformers' own",
        f"{done[0]['beams']} beams · batch {done[0]['batch']}, as many tokens generated as the"
        f" prompt has · percent: cache, of the prompt · {record['flags']['dtype']},"
        f" random weights, {record['device']}",
        1,
        len(models),
        looks.values(),
        height=3.2,
    )
    for ax, model in zip(axes, models, strict=True):
        speeds = {
            (row["engine"], row["prompt"]): row.get("tokens/s", 0.0)
            for row in done
            if row["model"] == model
        }
        lengths = list(dict.fromkeys(length for _, length in speeds))
        for place, (engine, look) in enumerate(looks.items()):
            at = [number + 0.2 * (place - 1.5) for number in range(len(lengths))]
            heights = [speeds[engine, length] for length in lengths]
            ax.bar(at, heights, 0.18, color=look.color)
            for x, height, length in zip(at, heights, lengths, strict=True):
                stock = speeds["stock", length]
                told = f"{height / stock:.1f}x" if stock and height else ""
                ax.annotate(
                    told, (x, height), (0, 2), textcoords="offset points", ha="center", size=9
                )
        ax.set_xticks(range(len(lengths)), [f"{n} + {n}" for n in lengths])
        ax.grid(False, axis="x")
        ax.set_xlabel("tokens of the prompt + generated")
        ax.set_title(model_name(model), loc="left")
    axes[0].set_ylabel("tokens a second")
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_main(main)
