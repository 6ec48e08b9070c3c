"""A prompt, with scores and without: time, and memory beside the weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.tasks.flags import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    folder = Path(__file__).parent
    lengths = (1024, 2048, 4096, 8192, 32768)
    speed = Speed("prefill", __doc__, argv, folder, batch=(1,), prompt=lengths)
    speed.check_positions(max(speed.flags.prompt))
    speed.write(rows(speed))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model, length, batch and engine: window has no scores to add up."""
    flags = speed.flags
    for bench in speed.benches():
        for prompt, batch, engine in itertools.product(flags.prompt, flags.batch, flags.engine):
            labels = {"model": bench.shape, "prompt": prompt, "batch": batch, "engine": engine}
            config = speed.configs[engine]
            kept = {"kept_gb": bench.kept_bytes(config, batch, prompt) / 1e9}
            yield labels | bench.attempt(bench.prefill, config, batch, prompt) | kept


if __name__ == "__main__":
    run_main(main)
