"""The largest batch whose prompts and generated tokens fit in the device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer.config import InputError, KeyformerConfig
from keyformer_evaluation.speed.bench import Bench
from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.tasks.flags import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    folder = Path(__file__).parent
    speed = Speed("batch", __doc__, argv, folder, prompt=4096, new=4096)
    if speed.device.type != "cuda":
        raise InputError("the largest batch is that of a GPU's memory, and there is none")
    speed.check_positions(speed.flags.prompt + speed.flags.new)
    speed.write(rows(speed))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model and engine; stock's cache is that of full."""
    flags = speed.flags
    for bench in speed.benches():
        for engine, config in speed.configs.items():
            if not isinstance(config, KeyformerConfig) or engine not in flags.engine:
                continue
            batch = largest(bench, config, flags.prompt, flags.new)
            labels = {"model": bench.shape, "prompt": flags.prompt, "new": flags.new}
            yield labels | {"engine": engine, "batch": batch}


def largest(bench: Bench, config: KeyformerConfig, prompt: int, new: int) -> int:
    """By doubling, then halving what is between a batch that fits and one that does not."""
    fits, fails = 0, 1
    while bench.fits(config, fails, prompt, new):
        fits, fails = fails, 2 * fails
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if bench.fits(config, middle, prompt, new):
            fits = middle
        else:
            fails = middle
    return fits


if __name__ == "__main__":
    run_main(main)
