"""Throughput of ``generate`` from end to end, and the batch that fits into memory for it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keyformer.config import KeyformerConfig
from keyformer.replay import LEAST_STEPS
from keyformer_evaluation.speed.engines import Method
from keyformer_evaluation.speed.roofline import Roofline
from keyformer_evaluation.speed.timing import Record, free, peak_gb, reset_peak, wait

FIRST = 2 * LEAST_STEPS
"""New tokens before a stretch: among them is the capture of a step."""

STOCK_CHUNK = 512
"""Tokens that stock attends from at a time if it runs out of memory with a whole prompt."""


class Throughput(Roofline):
    """How many tokens a second a model generates."""

    def generation(
        self,
        config: Method,
        batch: int,
        prompt: int,
        new: int,
        beams: int,
        stretch: int,
    ) -> Record:
        """Seconds of ``generate``, tokens a second, the share of the floor's speed, and memory.

        Of more than ``stretch`` new tokens, that many are timed at three lengths and integrated.
        Where memory does not suffice for stock's attention over a whole prompt, it is read in
        chunks, which transformers offers.
        """
        if config is not None:
            self.generate(config, batch, prompt, FIRST, beams)  # compiles the kernels
        chunk = None
        before = reset_peak(self.device)
        try:
            seconds = self._seconds(config, batch, prompt, new, beams, stretch)
        except torch.OutOfMemoryError:
            if isinstance(config, KeyformerConfig):
                raise
            chunk = STOCK_CHUNK
        if chunk is not None:
            before = reset_peak(self.device)
            seconds = self._seconds(config, batch, prompt, new, beams, stretch, chunk)
        # A cache that keeps everything grows from the prompt to all of the text.
        grows = not isinstance(config, KeyformerConfig) or config.budget(prompt) > prompt
        ends = (prompt, prompt + new) if grows else (prompt, prompt)
        floor = sum(self.floor_ms(config, batch * beams, end) for end in ends) / 2e3 * new
        return {
            "seconds": seconds,
            "tokens/s": batch * new / seconds,
            "floor_seconds": floor,
            "floor / seconds": floor / seconds,
            "peak_gb": peak_gb(self.device, before),
            "prompt_chunk": chunk,
        }

    def _seconds(
        self,
        config: Method,
        batch: int,
        prompt: int,
        new: int,
        beams: int,
        stretch: int,
        chunk: int | None = None,
    ) -> float:
        """Seconds of ``generate``: of all of it, or by Simpson's rule over three stretches."""
        if FIRST + stretch >= new:
            return self.generate(config, batch, prompt, new, beams, chunk=chunk)[-1]
        if isinstance(config, KeyformerConfig):
            config = replace(config, kv_budget=config.budget(prompt))  # as after the prompt
        times, some = [], FIRST + stretch
        for length in (prompt + new, prompt + new // 2, prompt):
            first, last = self.generate(config, batch, length, some, beams, FIRST, chunk)
            times.append((last - first) / stretch)
        end, middle, begin = times
        return first + (new - FIRST) * (begin + 4 * middle + end) / 6

    def generate(
        self,
        config: Method,
        batch: int,
        prompt: int,
        new: int,
        beams: int,
        first: int = 0,
        chunk: int | None = None,
    ) -> list[float]:
        """Seconds of ``generate``, greedy or with beams, on random prompts.

        Returns
        -------
        list
            From the start to the ``first`` new tokens, if any, and to all of them.
        """
        model, text = self.model(config), self.tokens(batch, prompt)
        times = []

        def look(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
            if tokens.shape[1] == prompt + first:
                wait(self.device)
                times.append(time.perf_counter() - start)
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        wait(self.device)
        start = time.perf_counter()
        model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            stopping_criteria=[look] if first else None,
            prefill_chunk_size=chunk,
            cache_implementation="static" if config == "static" else None,
        )
        wait(self.device)
        return [*times, time.perf_counter() - start]

    def fits(self, config: KeyformerConfig, batch: int, prompt: int, new: int) -> bool:
        """Whether prompts and ``new`` tokens after each fit in memory."""
        free(self.device)
        try:
            model, cache = self.model(config), self.cache(config, new)
            text = self.tokens(batch, prompt)
            for tokens in (text, text[:, :1], text[:, :1], text[:, :1]):
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            wait(self.device)
        except torch.OutOfMemoryError:
            return False
        return True


def longest_text(prompt: int, new: int, stretch: int) -> int:
    """The tokens of the longest text that :meth:`Throughput.generation` measures."""
    if FIRST + stretch >= new:
        return prompt + max(new, FIRST)
    return prompt + new + FIRST + stretch
