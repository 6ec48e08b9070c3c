"""The floor of a decode step: the time in which all that it reads can be read once.

That is its weights and the kept keys and values, at the bandwidth that a large copy reaches on the
same device in the same run.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from keyformer.config import KeyformerConfig
from keyformer_evaluation.speed.engines import Engines, Method
from keyformer_evaluation.speed.timing import median_ms

COPIED_BYTES = {"cuda": 2**32, "cpu": 2**26}
"""Of the copy that measures bandwidth: many times a cache."""


class Roofline(Engines):
    """Engines, and the least time that a decode step of theirs can take.

    Parameters
    ----------
    repeats
        Timings of which the median counts.

    Attributes
    ----------
    weight_bytes
        Bytes of parameters that a decode step reads.
    bandwidth
        Bytes a second, read and written, of a large copy.
    """

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device, repeats: int) -> None:
        super().__init__(shape, dtype, device)
        self.repeats = repeats
        self.weight_bytes = step_weight_bytes(self.stock)
        self.bandwidth = copy_bandwidth(device, repeats)

    def kept_bytes(self, config: Method, batch: int, prompt: int) -> int:
        """Bytes of keys and values that a step after a prompt reads."""
        kept = prompt
        if isinstance(config, KeyformerConfig):
            kept = min(prompt, config.budget(prompt))
        of_token = 2 * self.layers * self.kv_heads * self.head_dim * self.stock.dtype.itemsize
        return batch * kept * of_token

    def floor_ms(self, config: Method, batch: int, prompt: int) -> float:
        """The least time of a decode step after a prompt."""
        read = self.weight_bytes + self.kept_bytes(config, batch, prompt)
        return 1e3 * read / self.bandwidth


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters that a decode step reads."""
    read = {id(p): p.nbytes for p in model.parameters()}
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        del read[id(embedding)]  # of which a step reads a row
    return sum(read.values())


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / median_ms(lambda: target.copy_(source), device, repeats)
