"""All that is measured of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keyformer_evaluation.speed.latency import Latency
from keyformer_evaluation.speed.throughput import Throughput
from keyformer_evaluation.speed.timing import Record, free


class Bench(Latency, Throughput):
    """A model's latency and throughput under every engine, each beside its floor."""

    def attempt(self, measure: Callable[..., Record], *arguments: Any) -> Record:
        """A measurement, or that the device's memory did not suffice for it."""
        try:
            return measure(*arguments)
        except torch.OutOfMemoryError:
            return {"ms": "out of memory"}
        finally:
            free(self.device)
