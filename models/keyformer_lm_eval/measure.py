"""Accuracy of a configuration on a task of lm-eval, item by item: what sweeps measure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from keyformer.config import InputError, KeyformerConfig
from keyformer_evaluation.records.identity import Settings
from keyformer_evaluation.records.store import Result, Store
from keyformer_lm_eval.harness import evaluate, find_tasks
from keyformer_lm_eval.model import KeyformerLM

EXAMPLES = 1234
"""lm-eval's seed for drawing the examples of a prompt: the same ones whatever the method's seed."""


@dataclass(frozen=True)
class Accuracy:
    """accuracy: 100 where the continuation of highest likelihood is the right one, else 0.

    Attributes
    ----------
    path, dtype
        What :func:`keyformer.load_model` loads.
    task
        Of lm-eval or bundled, of multiple choice; no group.
    shots
        Examples in each prompt.
    limit
        Documents; None is all.
    bs
        Batch size.
    store
        Where finished requests are kept, beside whole tasks.
    """

    path: str
    dtype: str
    task: str
    shots: int
    limit: int | None
    bs: int
    store: Path | None = None

    @property
    def setting(self) -> Settings:
        """What the results depend on beside configuration, item, code and device."""
        return {"dtype": self.dtype, "bs": self.bs, "lm_eval": version("lm_eval")}

    @property
    def contents(self) -> list[Settings]:
        """One item: the task as a whole, since its prompts' examples are drawn in one go."""
        return [{"task": self.task, "shots": self.shots, "limit": self.limit}]

    @property
    def costs(self) -> list[float]:
        """How long it takes, in no unit: prompts grow with their examples."""
        return [(self.limit or 200) * (1.0 + self.shots)]

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Evaluate a configuration, which has a seed."""
        lm = _load(self.path, self.dtype, device, self.bs)
        lm.keyformer_config = config
        lm.store = Store(self.store)
        with redirect_stderr(io.StringIO()):  # several bars a run; there is one over the runs
            results = evaluate(
                lm,
                [self.task],
                find_tasks([self.task]),
                self.shots,
                limit=self.limit,
                bootstrap_iters=0,
                fewshot_random_seed=EXAMPLES,
            )
        samples = results["samples"].get(self.task, [])
        if not samples or "acc" not in samples[0]:
            raise InputError(f"task {self.task!r} is not one of multiple choice with an accuracy")
        return [{"accuracy": [100 * float(sample["acc"]) for sample in samples]}]


@lru_cache(maxsize=1)
def _load(path: str, dtype: str, device: torch.device, bs: int) -> KeyformerLM:
    logging.disable_progress_bar()
    return KeyformerLM(path, "full", dtype=dtype, device=str(device), batch_size=bs, share=False)
