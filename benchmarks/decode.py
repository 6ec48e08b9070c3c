"""One decode step, scoring and eviction included, beside stock transformers and the floor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer_evaluation.speed.latency import STEPS
from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.tasks.flags import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    folder = Path(__file__).parent
    speed = Speed("decode", __doc__, argv, folder, batch=(1, 4, 16), prompt=(4096,))
    timed = STEPS * (speed.flags.repeats + 2) + 2
    speed.check_positions(max(speed.flags.prompt) + timed)
    speed.write(rows(speed))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model, length, batch and engine."""
    flags = speed.flags
    for bench in speed.benches():
        for prompt, batch, engine in itertools.product(flags.prompt, flags.batch, flags.engine):
            labels = {"model": bench.shape, "prompt": prompt, "batch": batch, "engine": engine}
            config = speed.configs[engine]
            yield labels | bench.attempt(bench.decode_step, config, batch, prompt)


if __name__ == "__main__":
    run_main(main)
