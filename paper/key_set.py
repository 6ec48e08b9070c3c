"""Key tokens chosen at every step, as in the paper, or once, as the authors' code does."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import KEY_SETS, NOISE_SCHEDULES, KeyformerConfig
from keyformer_evaluation.studies.pictures import Figure, method_bars
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables
from keyformer_evaluation.studies.written import Written


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("key_set", __doc__, argv, PICTURES)
    results = yield from study.measure(
        Cell(
            {"key_set": key_set, "noise_schedule": schedule},
            KeyformerConfig(kv_cache=60, recent=30, key_set=key_set, noise_schedule=schedule),
        )
        for key_set in KEY_SETS
        for schedule in NOISE_SCHEDULES
    )
    print_tables(results)
    study.differences += print_differences(
        results,
        "Does it help that key tokens compete at every step? dynamic - frozen, fresh noise",
        labelled(key_set="dynamic", noise_schedule="fresh"),
        labelled(key_set="frozen", noise_schedule="fresh"),
    )
    study.differences += print_differences(
        results,
        "Does it help to draw noise at every step? fresh - once, dynamic key set",
        labelled(key_set="dynamic", noise_schedule="fresh"),
        labelled(key_set="dynamic", noise_schedule="once"),
    )
    study.write(results)


NAMES = {
    "dynamic": "chosen at every step",
    "frozen": "chosen once",
    "fresh": "fresh noise",
    "once": "noise drawn once",
}


def picture(written: Written) -> Figure:
    """A bar for each combination."""
    title = "When Keyformer chooses its key tokens and draws its noise"
    return method_bars(written, title, "cache 60 % of the prompt", names=NAMES)


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
