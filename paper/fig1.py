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
from keyformer_evaluation.studies.pictures import LOOKS, Figure, Look, model_name, page
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.flags import run_main

ENGINES = ("stock", "full", "keyformer")
WEIGHTS = Look("the model's weights", "#666666", "", ":")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    speed = Speed(
        "fig1",
        __doc__,
        argv,
        Path(__file__).parent,
        pictures=PICTURES,
        length=(512, 1024, 2048, 4096, 8192),
        batch=1,
        stretch=64,
    )
    longest = max(speed.flags.length)
    speed.check_positions(longest_text(longest // 2, longest - longest // 2, speed.flags.stretch))
    speed.write(rows(speed))


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


def picture(written: Written) -> Figure:
    """Seconds on the left, bytes at the end of the text on the right, of the first model."""
    done, flags = written.rows, written.record["flags"]
    model = done[0]["model"]
    figure, ((latency, size),) = page(
        f"Time and memory of long texts, {model_name(model)}",
        f"half of each text is the prompt, half is generated greedily · batch {flags['batch']}"
        f" · Keyformer with {float(flags['kv_cache']):g} % of the cache"
        f" · {flags['dtype']}, random weights, {written.record['device']}"
        " · transformers and the full cache keep the same",
        1,
        2,
        [LOOKS[engine] for engine in ENGINES] + [WEIGHTS],
        height=3.2,
    )
    for place, engine in enumerate(ENGINES):
        of_engine = [row for row in done if (row["model"], row["engine"]) == (model, engine)]
        look = LOOKS[engine]
        style = {"color": look.color, "marker": look.marker, "linestyle": look.line}
        style["markersize"] = 11 - 2.5 * place  # so that both of two that coincide are seen
        timed = [row for row in of_engine if "seconds" in row]
        latency.plot([r["length"] for r in timed], [r["seconds"] for r in timed], **style)
        size.plot([r["length"] for r in of_engine], [r["kv_gb"] for r in of_engine], **style)
    size.axhline(done[0]["weights_gb"], color=WEIGHTS.color, linestyle=WEIGHTS.line)
    latency.set_title("time for the whole text", loc="left")
    latency.set_ylabel("seconds")
    size.set_title("keys and values at its end", loc="left")
    size.set_ylabel("GB")
    for ax in (latency, size):
        ax.set_xlabel("length of the text (tokens)")
        ax.set_ylim(bottom=0)
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_main(main)
