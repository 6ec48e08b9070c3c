"""Latency of the parts of generation: a prompt, a decode step, and the attention in a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from keyformer.config import KeyformerConfig
from keyformer_evaluation.speed.engines import Method
from keyformer_evaluation.speed.roofline import Roofline
from keyformer_evaluation.speed.timing import Record, median_ms, peak_gb, reset_peak, wait

STEPS = 4
"""Decode steps of a timing, one after the other, so that the host's part overlaps the device's."""


class Latency(Roofline):
    """How long one call of a model takes."""

    def prefill(self, config: Method, batch: int, prompt: int) -> Record:
        """Median time of a prompt, and the most memory beside the weights."""
        model, text = self.model(config), self.tokens(batch, prompt)
        held: list[Any] = []

        def run() -> None:
            held[:] = [self.cache(config, prompt=prompt)]
            model(input_ids=text, past_key_values=held[0], use_cache=True, logits_to_keep=1)

        before = reset_peak(self.device)
        ms = median_ms(run, self.device, self.repeats)
        return {"ms": ms, "peak_gb": peak_gb(self.device, before)}

    def decode_step(self, config: Method, batch: int, prompt: int) -> Record:
        """Median time of a decode step after a prompt, of STEPS in a row, and of its capture."""
        model, token = self.model(config), self.tokens(batch, 1)
        evicting = isinstance(config, KeyformerConfig)
        if not evicting:
            cache = self.filled(config, batch, prompt, new_tokens=STEPS * (self.repeats + 2) + 2)
        else:
            cache = self.cache(config, new_tokens=prompt)
            text = self.tokens(batch, prompt)
            model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1)
        run: Callable[..., Any] = model
        if config == "static":
            run = self.compiled()

        def step() -> None:  # without a mask, which would be looked at before a replay
            run(input_ids=token, past_key_values=cache, use_cache=True, return_dict=True)

        step()  # compiles the kernels
        wait(self.device)
        start = time.perf_counter()
        step()  # captures the graph, where there is one
        wait(self.device)
        capture_ms = 1e3 * (time.perf_counter() - start)

        def some_steps() -> None:
            for _ in range(STEPS):
                step()

        ms = median_ms(some_steps, self.device, self.repeats) / STEPS
        floor = self.floor_ms(config, batch, prompt)
        captured = getattr(cache, "graph", None) is not None
        return {
            "ms": ms,
            "floor_ms": floor,
            "floor / ms": floor / ms,
            "capture_ms": capture_ms if captured else None,
        }

    def attention(self, config: Method, batch: int, prompt: int) -> float:
        """Median ms of what all layers of a decode step do between query and output; not stock's.

        Their keys and values are random. On a GPU the layers are captured and replayed.
        """
        cache = self.cache(config, new_tokens=prompt)
        options: dict[str, Any] = {"dtype": self.stock.dtype, "device": self.device}
        queries = torch.randn(batch, self.heads, prompt, self.head_dim, **options)
        pairs = torch.randn(2, batch, self.kv_heads, prompt, self.head_dim, **options)

        def attend(tokens: int) -> None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=self.device)
            query, (key, value) = queries[:, :, :tokens], pairs[:, :, :, :tokens]
            for layer in range(self.layers):
                cache.attend(query, key, value, layer, real, scale=self.head_dim**-0.5)

        for tokens in (prompt, 1):
            attend(tokens)
        run: Callable[[], Any] = lambda: attend(1)  # noqa: E731
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                attend(1)
            run = graph.replay
        return median_ms(run, self.device, self.repeats)
