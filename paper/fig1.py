"""Figure 1: latency and bytes of keys and values against the length of the text.

Half of the text is the prompt. Latency is of one sequence, greedy, stretches integrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer.config import KeyformerConfig
from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.throughput import longest_text
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.studies.pictures import COLORS, Figure
from keyformer_evaluation.tasks.flags import run_main

ENGINES = ("stock", "full", "keyformer")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    speed = Speed(
        "fig1",
        __doc__,
        argv,
        Path(__file__).parent,
        draws=True,
        length=(512, 1024, 2048, 4096, 8192),
        batch=1,
        stretch=64,
    )
    longest = max(speed.flags.length)
    speed.check_positions(longest_text(longest // 2, longest - longest // 2, speed.flags.stretch))
    speed.draw(picture(speed.write(rows(speed))))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model, length and engine."""
    flags = speed.flags
    for bench in speed.benches():
        for length in flags.length:
            for engine in ENGINES:
                config = speed.configs[engine]
                labels = {"model": bench.shape, "length": length, "engine": engine}
                half = length // 2
                measured = bench.attempt(
                    bench.generation, config, flags.batch, half, length - half, 1, flags.stretch
                )
                evicts = isinstance(config, KeyformerConfig) and config.budget(half) <= half
                kept = bench.kept_bytes(config, flags.batch, half if evicts else length)
                sizes = {"kv_gb": kept / 1e9, "weights_gb": bench.weight_bytes / 1e9}
                yield labels | measured | sizes


def picture(done: Sequence[Record]) -> Figure:
    """Seconds on the left, bytes at the end of the text on the right, of the first model."""
    model = done[0]["model"]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    latency, size = figure.subplots(1, 2)
    for engine in ENGINES:
        of_engine = [row for row in done if (row["model"], row["engine"]) == (model, engine)]
        look = {"marker": "o", "label": engine, "color": COLORS.get(engine, "#9467bd")}
        timed = [row for row in of_engine if "seconds" in row]
        latency.plot([r["length"] for r in timed], [r["seconds"] for r in timed], **look)
        size.plot([r["length"] for r in of_engine], [r["kv_gb"] for r in of_engine], **look)
    size.axhline(done[0]["weights_gb"], color="black", linewidth=0.8, linestyle=":")
    latency.set_ylabel("seconds")
    size.set_ylabel("keys and values, GB (dotted: weights)")
    for ax in (latency, size):
        ax.set_xlabel("tokens, half of them generated")
        ax.legend(fontsize=8)
    figure.suptitle(model)
    return figure


if __name__ == "__main__":
    run_main(main)
