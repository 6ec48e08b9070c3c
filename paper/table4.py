"""Table 4: which noise is added to the logits, at 60 % of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer.config import NOISES, KeyformerConfig
from keyformer_evaluation.studies.pictures import Figure, method_bars
from keyformer_evaluation.studies.study import Published, Study, run_study
from keyformer_evaluation.studies.sweep import Cell, Steps
from keyformer_evaluation.studies.tables import labelled, print_differences, print_tables
from keyformer_evaluation.studies.written import Written

ROUGE_2 = {
    "GPT-J-6B": (19.44, 14.53, 12.49, 18.87),
    "Cerebras-GPT-6.7B": (15.25, 9.54, 8.98, 12.73),
    "MPT-7B": (17.57, 10.17, 7.56, 16.38),
}
PAPER: Published = {
    (model, "summarization"): {
        (noise,): (number,) for noise, number in zip(NOISES, numbers, strict=True)
    }
    for model, numbers in ROUGE_2.items()
}


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("table4", __doc__, argv, PICTURES)
    results = yield from study.measure(
        Cell({"noise": noise}, KeyformerConfig(kv_cache=60, recent=30, noise=noise))
        for noise in NOISES
    )
    print_tables(results, study.beside(results, PAPER))
    for question, first, second in (
        ("Does Gumbel noise beat none?", "gumbel", "none"),
        ("Does Gumbel noise beat Gaussian?", "gumbel", "gaussian"),
        ("Is a constant the same as none, as softmax says?", "constant", "none"),
    ):
        study.differences += print_differences(
            results,
            f"{question} {first} - {second}",
            labelled(noise=first),
            labelled(noise=second),
        )
    study.write(results)


def picture(written: Written) -> Figure:
    """A bar for each noise."""
    title = "What Keyformer adds to the logits before it scores"
    return method_bars(written, title, "cache 60 % of the prompt")


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
