"""Table 2: few-shot accuracy with half of the cache, at 0 and 5 shots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from keyformer.config import KeyformerConfig
from keyformer_evaluation.studies.pictures import (
    LOOKS,
    Figure,
    draw_bars,
    model_name,
    page,
    setting,
)
from keyformer_evaluation.studies.study import Published, Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.data import warn_of_fewer
from keyformer_evaluation.tasks.flags import stop_without

try:
    from keyformer_lm_eval.harness import find_tasks
    from keyformer_lm_eval.measure import Accuracy
except ModuleNotFoundError as error:
    stop_without(error, extra="lm_eval")

METHODS = ("full", "h2o", "keyformer")
TASKS = ("copa", "openbookqa", "winogrande", "piqa")
ACCURACY = {
    "Cerebras-GPT-6.7B": {
        "copa": ((73.0, 68.0, 70.0), (73.0, 74.0, 74.0)),
        "openbookqa": ((34.8, 32.2, 32.6), (36.8, 38.0, 38.6)),
        "winogrande": ((60.2, 56.7, 57.9), (58.4, 59.5, 59.7)),
        "piqa": ((74.2, 72.9, 73.0), (74.4, 73.9, 73.6)),
    },
    "MPT-7B": {
        "copa": ((80.0, 75.0, 76.0), (83.0, 82.0, 84.0)),
        "openbookqa": ((41.8, 37.6, 40.6), (43.4, 44.0, 43.2)),
        "winogrande": ((68.7, 63.2, 64.1), (71.8, 72.1, 72.3)),
        "piqa": ((79.9, 79.4, 79.2), (80.7, 79.8, 80.1)),
    },
}
"""The paper's, at 0 and at 5 shots under each of METHODS."""
SHOTS = (0, 5)
PAPER: Published = {
    (model, task): {
        (shots, method): (number,)
        for shots, numbers in zip(SHOTS, of_task, strict=True)
        for method, number in zip(METHODS, numbers, strict=True)
    }
    for model, of_model in ACCURACY.items()
    for task, of_task in of_model.items()
}
OWN = ("questions made for the bundled models, in the form of the tasks named",)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    bundled = [f"tiny_{task}" for task in TASKS]
    study = Study(
        "table2",
        __doc__,
        argv,
        PICTURES,
        generates=False,
        more_flags=lambda parser: parser.add_argument(
            "--tasks",
            nargs="+",
            default=bundled,
            help="of lm-eval, such as the paper's copa, openbookqa, winogrande and piqa, or bundled"
            " (default: %(default)s)",
        ),
    )
    flags = study.flags
    find_tasks(flags.tasks)
    results = yield from study.collect(
        {
            (Path(path).name, task): [
                (
                    Cell(
                        {"shots": shots, "method": method},
                        KeyformerConfig.preset(method, kv_cache=50),
                    ),
                    Accuracy(path, flags.dtype, task, shots, flags.n_obs, flags.bs, flags.store),
                )
                for shots in SHOTS
                for method in METHODS
            ]
            for path in flags.model_path
            for task in flags.tasks
        }
    )
    for rows in results.values():
        warn_of_fewer(flags.n_obs, len(rows[0].per_item["accuracy"]))
    print_tables(results, study.beside(results, PAPER))
    for shots in SHOTS:
        study.differences += print_differences(
            results,
            f"Is Keyformer better than H2O at {shots} shots?",
            labelled(shots=shots, method="keyformer"),
            labelled(shots=shots, method="h2o"),
            "accuracy",
        )
    study.write(results)


def picture(written: Written) -> Figure:
    """A line for each number of shots, a column for each model, a group of bars for each task."""
    models, tasks = (list(dict.fromkeys(names)) for names in zip(*written.results, strict=True))
    figure, grid = page(
        "Few-shot accuracy with half of the cache",
        setting(written, *OWN[: any(task.startswith("tiny_") for task in tasks)]),
        len(SHOTS),
        len(models),
        [replace(LOOKS[method], marker="s", line="") for method in METHODS],
        sharex=True,
        sharey=True,
    )
    for ax, (shots, model) in zip(grid.flat, product(SHOTS, models), strict=True):
        for place, method in enumerate(METHODS):
            found = [
                row.values["accuracy"]
                for task in tasks
                for row in written.results[model, task]
                if (row.labels["shots"], row.labels["method"]) == (shots, method)
            ]
            at = [number + 0.27 * (place - 1) for number in range(len(tasks))]
            draw_bars(ax, at, found, LOOKS[method], 0.25)
        ax.set_xticks(range(len(tasks)), [task.removeprefix("tiny_") for task in tasks])
        ax.tick_params(axis="x", labelsize=9, length=0, rotation=18)
        ax.grid(False, axis="x")
        ax.set_ylim(0, 105)
        ax.set_title(f"{model_name(model)}, {shots} shots", loc="left")
    for ax in grid[-1]:
        ax.set_xlabel("task")
    for ax in grid[:, 0]:
        ax.set_ylabel("accuracy (%)")
    return figure


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
