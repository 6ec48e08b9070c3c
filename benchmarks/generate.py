"""generate from end to end: seconds and tokens a second, beside stock transformers and the floor.

The floor is that of the decode steps; the prompt comes on top. With --stretch N, N tokens are timed
at the beginning, the middle and the end of what is generated, and integrated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.throughput import longest_text
from keyformer_evaluation.speed.timing import Record
from keyformer_evaluation.tasks.flags import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    folder = Path(__file__).parent
    speed = Speed(
        "generate",
        __doc__,
        argv,
        folder,
        prompt=(4096,),
        new=(1024,),
        batch=(1, 16),
        beams=(1,),
        stretch=2**30,
    )
    sizes = list(zip(speed.flags.prompt, speed.flags.new, strict=False))
    speed.check_positions(max(longest_text(*size, speed.flags.stretch) for size in sizes))
    speed.write(rows(speed))


def rows(speed: Speed) -> Iterator[Record]:
    """A row for each model, number of tokens, batch, beams and engine."""
    flags = speed.flags
    for bench in speed.benches():
        for (prompt, new), batch, beams, engine in itertools.product(
            zip(flags.prompt, flags.new, strict=False), flags.batch, flags.beams, flags.engine
        ):
            labels = {"model": bench.shape, "prompt": prompt, "new": new, "batch": batch}
            labels |= {"beams": beams, "engine": engine}
            config = speed.configs[engine]
            yield labels | bench.attempt(
                bench.generation, config, batch, prompt, new, beams, flags.stretch
            )


if __name__ == "__main__":
    run_main(main)
