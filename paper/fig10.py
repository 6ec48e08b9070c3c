"""Figure 10: what a decode step moves of keys and values, and how long its attention takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.studies.pictures import COLORS, Figure
from keyformer_evaluation.tasks.flags import run_main

ENGINES = ("full", "h2o", "keyformer")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    folder, lengths = Path(__file__).parent, (1024, 2048, 4096)
    speed = Speed("fig10", __doc__, argv, folder, draws=True, prompt=lengths, batch=1)
    speed.draw(picture(speed.write(rows(speed))))


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


def picture(done: Sequence[Record]) -> Figure:
    """Both as shares of full attention's, of the first model."""
    model = done[0]["model"]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    titles = {"kv_gb": "keys and values read", "attention_ms": "attention"}
    for ax, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for place, engine in enumerate(ENGINES):
            of_engine = [r for r in done if (r["model"], r["engine"]) == (model, engine)]
            full = [r for r in done if (r["model"], r["engine"]) == (model, "full")]
            heights = [100 * a[name] / b[name] for a, b in zip(of_engine, full, strict=True)]
            at = [number + 0.25 * (place - 1) for number in range(len(heights))]
            ax.bar(at, heights, 0.22, label=engine, color=COLORS[engine])
        ax.set_xticks(range(len(full)), [str(row["prompt"]) for row in full])
        ax.set_xlabel("tokens of the prompt")
        ax.set_ylabel("% of full attention's")
        ax.set_title(title)
        ax.legend(fontsize=8)
    figure.suptitle(f"A decode step of {model}")
    return figure


if __name__ == "__main__":
    run_main(main)
