"""Figure 7: ROUGE against the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence

from keyformer_evaluation.studies.sizes import sweep_sizes
from keyformer_evaluation.studies.study import Study, run_study
from keyformer_evaluation.studies.sweep import Steps

SIZES = (20, 30, 40, 50, 60, 70, 80, 90)


def main(argv: Sequence[str] | None = None) -> Steps:
    """Measure, print, write."""
    study = Study("fig7", __doc__, argv)
    yield from sweep_sizes(study, SIZES, "Methods by cache size", compared_at=(20, 50, 70))


if __name__ == "__main__":
    run_study(main)
