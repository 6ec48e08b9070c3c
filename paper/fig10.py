"""Figure 10: what a decode step moves of keys and values, and how long its attention takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.studies.pictures import LOOKS, Figure, draw_bars, model_name, page
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.flags import run_main

ENGINES = ("full", "h2o", "keyformer")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    folder, lengths = Path(__file__).parent, (1024, 2048, 4096)
    speed = Speed("fig10", __doc__, argv, folder, pictures=PICTURES, prompt=lengths, batch=1)
    speed.write(rows(speed))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model, length and method."""
    flags = speed.flags
    for bench in speed.benches():
        for prompt, engine in itertools.product(flags.prompt, ENGINES):
            config = speed.configs[engine]
            labels = {"model": bench.shape, "prompt": prompt, "engine": engine}
            moved = bench.kept_bytes(config, flags.batch, prompt) / 1e9
            ms = bench.attention(config, flags.batch, prompt)
            yield labels | {"kv_gb": moved, "attention_ms": ms}


def picture(written: Written) -> Figure:
    """Both for each method, of the first model."""
    done, flags = written.rows, written.record["flags"]
    model = done[0]["model"]
    figure, (axes,) = page(
        f"What a decode step of {model_name(model)} reads, and how long its attention takes",
        f"batch {flags['batch']} · H2O and Keyformer with {float(flags['kv_cache']):g} % of the"
        f" cache · {flags['dtype']}, random weights, {written.record['device']}",
        1,
        2,
        [replace(LOOKS[engine], marker="s", line="") for engine in ENGINES],
        height=2.8,
    )
    told = {
        "kv_gb": ("keys and values read", "GB a token", 2),
        "attention_ms": ("attention of all layers", "ms a token", 2),
    }
    for ax, (name, (title, unit, digits)) in zip(axes, told.items(), strict=True):
        for place, engine in enumerate(ENGINES):
            of_engine = [r for r in done if (r["model"], r["engine"]) == (model, engine)]
            at = [number + 0.28 * (place - 1) for number in range(len(of_engine))]
            draw_bars(ax, at, [r[name] for r in of_engine], LOOKS[engine], 0.26, digits)
        ax.set_xticks(range(len(of_engine)), [str(row["prompt"]) for row in of_engine])
        ax.grid(False, axis="x")
        ax.set_xlabel("tokens of the prompt")
        ax.set_ylabel(unit)
        ax.set_title(title, loc="left")
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_main(main)
