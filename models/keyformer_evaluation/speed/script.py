"""A script that measures speed: its flags in; a table, a record and a picture out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from keyformer.config import InputError, KeyformerConfig
from keyformer.integration import DTYPES, check_device
from keyformer_evaluation.records.results import check_record, run_record, write_json
from keyformer_evaluation.speed.bench import Bench
from keyformer_evaluation.speed.engines import ENGINES, Method
from keyformer_evaluation.speed.shapes import SHAPES, TINY, model_config
from keyformer_evaluation.speed.timing import Record, free
from keyformer_evaluation.studies.tables import print_columns
from keyformer_evaluation.studies.written import PICTURES, Pictures, Written
from keyformer_evaluation.tasks.flags import PERCENT, PERCENT_ABOVE_0, Parser, whole

MOST_OF_TINY = 64
"""The largest default size where all models are tiny ones, which only show that a script works."""
REPEATS_OF_TINY = 3


class Speed:
    """What one script measures: its flags in; a table and a record out.

    Parameters
    ----------
    name, description
        Of the script; the record is written to ``folder``/results/local/``name``.json, unless
        --output says otherwise.
    defaults
        Flags of the script's own and their defaults: a whole number, or a tuple of them.
    pictures
        What draws the record, by "".

    Attributes
    ----------
    flags
        What was asked for; each of ``defaults`` by its name.
    device, dtype
        Where and in what the models are.
    """

    def __init__(
        self,
        name: str,
        description: str | None,
        argv: Sequence[str] | None,
        folder: Path,
        *,
        pictures: Pictures | None = None,
        **defaults: int | tuple[int, ...],
    ) -> None:
        parser = Parser(description=description, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument(
            "--model", nargs="+", choices=SHAPES, default=["mpt-7b"], help="shapes of models"
        )
        parser.add_argument(
            "--engine",
            nargs="+",
            choices=ENGINES,
            default=[name for name in ENGINES if name != "static"],
            help="static takes half a minute a size to compile",
        )
        parser.add_argument(
            "--kv_cache", type=PERCENT_ABOVE_0, default=50.0, help="%% of the prompt"
        )
        parser.add_argument("--recent", type=PERCENT, default=30.0, help="%% of the cache")
        parser.add_argument(
            "--rule", default="accumulated", help="of h2o and keyformer: accumulated(spread=1024)"
        )
        parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        parser.add_argument("--device", help="default: a GPU if there is one")
        parser.add_argument(
            "--repeats", type=whole(1), default=20, help="of which the median counts"
        )
        parser.add_argument("--output", default=folder / "results" / "local" / f"{name}.json")
        for flag, default in defaults.items():
            several: dict[str, Any] = {} if isinstance(default, int) else {"nargs": "+"}
            parser.add_argument(f"--{flag}", type=whole(1), default=default, **several)
        self.flags = parser.parse_args(argv)
        if set(self.flags.model) <= set(TINY):
            small = {flag: _at_most(MOST_OF_TINY, default) for flag, default in defaults.items()}
            parser.set_defaults(**small, repeats=REPEATS_OF_TINY)
            self.flags = parser.parse_args(argv)
        self.configs = {name: self.config(name, self.flags.kv_cache) for name in ENGINES}
        self.device = check_device(self.flags.device)
        self.dtype = DTYPES[self.flags.dtype]
        output = Path(self.flags.output)
        self.pictures = pictures or {}
        kinds = PICTURES if pictures else ()
        check_record(output, *map(output.with_suffix, kinds))

    def check_positions(self, tokens: int) -> None:
        """Refuse texts that a model has no positions for, before anything is measured.

        Raises
        ------
        InputError
            If a model's table has fewer than ``tokens``, those of the longest text.
        """
        for shape in self.flags.model:
            config = model_config(shape)
            biases = getattr(config, "max_seq_len", None)  # of which only stock makes a table
            table = biases or config.max_position_embeddings
            if tokens > table and not (biases and "stock" not in self.flags.engine):
                raise InputError(
                    f"--model {shape} has {table} positions, and the longest text needs {tokens}"
                )

    def config(self, engine: str, kv_cache: float) -> Method:
        """An engine's method at a cache size in percent."""
        if engine == "stock":
            return None
        if engine == "static":
            return "static"
        settings = {"kv_cache": kv_cache, "recent": self.flags.recent, "seed": 0}
        return KeyformerConfig.preset(engine, rule=self.flags.rule, **settings)

    def benches(self) -> Iterator[Bench]:
        """Each model in turn, alone in memory, with a bandwidth measured beside it."""
        for name in self.flags.model:
            bench = Bench(name, self.dtype, self.device, self.flags.repeats)
            yield bench
            del bench
            free(self.device)

    @torch.no_grad()
    def write(self, rows: Iterable[Record]) -> None:
        """Measure: say each row as it comes, then print all, write how they came about, draw.

        Rows that came before an error are written, too.
        """
        done: list[Record] = []
        try:
            for row in rows:
                done.append(row)
                shown = (f"{name} {_shown(value)}" for name, value in row.items())
                print(", ".join(shown), flush=True)
        finally:
            written = self._finish(done)
        for picture in self.pictures.values():
            written.write(picture(written))

    def _finish(self, done: list[Record]) -> Written:
        flags = {name: str(value) for name, value in vars(self.flags).items()}
        record = {**run_record(self.device), "flags": flags, "rows": done}
        if done:
            heads = list(dict.fromkeys(name for row in done for name in row))
            print()
            print_columns([heads, *([_shown(row.get(name)) for name in heads] for row in done)])
            write_json(self.flags.output, record)
        return Written(Path(self.flags.output), record)


def _at_most(most: int, default: int | tuple[int, ...]) -> int | list[int]:
    """A default size, or several, none above ``most`` and none twice."""
    if isinstance(default, int):
        return min(default, most)
    return list(dict.fromkeys(min(size, most) for size in default))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
