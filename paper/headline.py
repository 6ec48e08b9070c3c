"""What Keyformer keeps and what it saves, in one picture of committed records; nothing is measured.

Left and middle, of a real model with a small cache: needles found, and how much less likely the
summaries are than with the full cache. Right: a decode step's time beside transformers' own, and
the floor, what reading the weights and the cache alone would take.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keyformer.config import InputError
from keyformer_evaluation.records.results import check_record, write_json
from keyformer_evaluation.studies.pictures import (
    INTERVALS,
    LOOKS,
    Figure,
    Look,
    draw_rows,
    model_name,
    page,
)
from keyformer_evaluation.studies.study import ROOT
from keyformer_evaluation.studies.sweep import Estimate
from keyformer_evaluation.studies.written import Written, read_written
from keyformer_evaluation.tasks import flags as flag

RECALL = ROOT / "paper" / "results" / "smollm2" / "recall"
RECORDS = {
    "retrieval": RECALL / "retrieval.json",
    "summaries": RECALL / "xsum" / "summaries.json",
    "decode": ROOT / "benchmarks" / "results" / "decode_llama.json",
}
"""By the flag that names another, what is drawn."""

SIZE = 20
"""Of the cache, in percent of the prompt, at which accuracy is shown."""

METHODS = ("full", "streaming_llm", "h2o", "keyformer", "recall")
ENGINES = ("stock", "static", "full", "keyformer")
FLOOR = Look("memory floor", "#BBBBBB", "")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = flag.Parser(prog="headline.py", description=__doc__)
    for name, path in RECORDS.items():
        parser.add_argument(f"--{name}", type=Path, default=path, help="the record of that script")
    parser.add_argument("--out", type=Path, default=ROOT / "paper" / "results" / "local")
    argv = sys.argv[1:] if argv is None else argv
    flags = parser.parse_args(argv)
    record, *files = (flags.out / f"headline.{kind}" for kind in ("json", "png", "svg"))
    check_record(record, *files, script="headline.py")
    command = shlex.join(["python", "paper/headline.py", *argv])
    paths = [os.path.relpath(getattr(flags, name), flags.out) for name in RECORDS]
    written = Written(record, {"command": command, "drawn_from": paths})
    try:
        figure = picture(written)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the records lack what is drawn of them: {error!r}") from error
    write_json(record, written.record)
    written.write(figure)
    print(f"picture and record: {flags.out / 'headline.{png,svg,json}'}")


def picture(written: Written) -> Figure:
    """Three panels: needles, summaries, a decode step."""
    of = [read_written(written.path.parent / name) for name in written.record["drawn_from"]]
    retrieval, summaries, decode = of
    needles = shown(retrieval, "needle", "answered")
    lost = shown(summaries, "reference", "nll_minus_full")
    (model,) = {model for model, _ in retrieval.results}
    step = {row["engine"]: row for row in reversed(decode.rows)}  # the first of each engine counts
    asked, items = retrieval.record["items"]["needle"], summaries.record["items"]["summarization"]
    speed = step["keyformer"]
    figure, ((found_ax, lost_ax, step_ax),) = page(
        "What a small key/value cache keeps, and what a token costs",
        f"left, middle: {model_name(model)}, cache {SIZE} % of the prompt · {asked} needles,"
        f" {items} summaries of {summaries.path.parent.name} · {INTERVALS}\n"
        f"right: {model_name(speed['model'])}, {decode.record['flags']['dtype']}, random weights,"
        f" one {decode.record['device']} · prompt of {speed['prompt']} tokens, batch"
        f" {speed['batch']}, Keyformer with {float(decode.record['flags']['kv_cache']):g} % of it",
        1,
        3,
        height=2.7,
        width_ratios=(1, 1.1, 1.1),
    )
    looks = [LOOKS[method] for method in METHODS]
    draw_rows(found_ax, looks, [needles[method] for method in METHODS], 0)
    found_ax.set_title("needles found", loc="left")
    found_ax.set_xlabel("% (more is better)")
    draw_rows(lost_ax, [replace(look, label="") for look in looks], [lost[m] for m in METHODS], 2)
    lost_ax.set_xlim(right=1.5 * max(lost[method][0] for method in METHODS))
    lost_ax.set_title("lost on summaries", loc="left")
    lost_ax.set_xlabel("nats per token (less is better)")
    times = [(row["ms"],) * 3 for row in map(step.__getitem__, ENGINES)]
    floor = (speed["floor_ms"],) * 3
    draw_rows(step_ax, [*map(LOOKS.__getitem__, ENGINES), FLOOR], [*times, floor], 1)
    step_ax.set_title("time of a decode step", loc="left")
    step_ax.set_xlabel("ms per token (less is better)")
    return figure


def shown(written: Written, task: str, metric: str) -> dict[str, Estimate]:
    """Of each method at the size, and of the full cache, a metric of a task."""
    return {
        row.labels["method"]: row.values[metric]
        for (_, of), rows in written.results.items()
        for row in rows
        if of == task and row.labels["kv_cache"] in ("", SIZE)
    }


PICTURES = {"": picture}


if __name__ == "__main__":
    flag.run_main(main)
