"""Figure 8: long documents, from 10 to 50 % of the cache.

Without --dataset_path it takes the corpus's held-out reports with three times the filler of those
that the bundled models were trained on: about 1100 tokens instead of 700, and where that is more
than a model's table of positions leaves room for, cut there. The paper's are GovReport's.
"""

from __future__ import annotations

from collections.abc import Sequence

from keyformer_evaluation.studies.pictures import Figure
from keyformer_evaluation.studies.sizes import size_curves, sweep_sizes
from keyformer_evaluation.studies.study import KINDS, PAPER, Study, run_study
from keyformer_evaluation.studies.sweep import Steps
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.data import Item
from tiny.corpus import document

SIZES = (10, 20, 30, 40, 50)
FILLER = 3.0


def long_documents(task: str) -> list[Item]:
    """200 held-out documents, longer than those of the training."""
    return [document("eval", index, FILLER, KINDS[task]) for index in range(200)]


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    paper = {**PAPER, "max_tokenizer_length": 8192}
    study = Study("fig8", __doc__, argv, PICTURES, items=long_documents, paper=paper)
    yield from sweep_sizes(study, SIZES, compared_at=(50,))


def picture(written: Written) -> Figure:
    """Every method over the size of the cache."""
    return size_curves(written, "Long documents, by the size of the cache")


PICTURES = {"": picture}


if __name__ == "__main__":
    run_study(main)
