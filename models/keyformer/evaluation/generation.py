"""The generation loop: prompts in, texts out, with time and cache size measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from keyformer.cache import KeyformerCache
from keyformer.config import KeyformerConfig
from keyformer.evaluation.attentions import AttentionRecorder
from keyformer.evaluation.data import encode


@dataclass
class Generated:
    """What a run over a dataset produced.

    Attributes
    ----------
    texts
        For each prompt its ``num_return_sequences`` generated texts, best first.
    sequence_scores
        In the same shape, each sequence's log-probability divided by its length; None
        unless asked for.
    tokens
        Generated tokens over all returned sequences, end-of-sequence tokens included.
    seconds
        Time spent in ``generate``.
    kv_bytes_prompt, kv_bytes_end
        For each batch, bytes of the cache after the prompt and after the last token. A
        batch holds batch size x beams sequences.
    """

    texts: list[list[str]] = field(default_factory=list)
    sequence_scores: list[list[float]] | None = None
    tokens: int = 0
    seconds: float = 0.0
    kv_bytes_prompt: list[int] = field(default_factory=list)
    kv_bytes_end: list[int] = field(default_factory=list)


class _AfterPrompt(StoppingCriteria):
    """Reads the cache's size once the first token is out; stops nothing."""

    def __init__(self, cache: KeyformerCache) -> None:
        self.cache = cache
        self.bytes: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.bytes is None:
            self.bytes = self.cache.memory_bytes()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: KeyformerConfig,
    *,
    batch_size: int = 1,
    padding: bool | str = True,
    max_prompt_tokens: int | None = None,
    max_total_tokens: int | None = None,
    include_prompt: bool = False,
    include_special_tokens: bool = False,
    sequence_scores: bool = False,
    attentions: tuple[Path, bool, bool] | None = None,
    progress: bool = True,
    **generate_options: Any,
) -> Generated:
    """Generate a continuation of each prompt under one method.

    Parameters
    ----------
    config
        The method; each batch gets a KeyformerCache of its own.
    padding, max_prompt_tokens
        As the tokenizer's ``padding`` and ``max_length``; prompts are not cut here.
    max_total_tokens
        Bound on prompt and generated tokens together, beside ``max_new_tokens``.
    include_prompt, include_special_tokens
        What the texts contain beside the generated words.
    sequence_scores
        Fill in ``Generated.sequence_scores``.
    attentions
        Folder, and whether to save there the weights of the prompt and of decode steps:
        one .npz a batch, see :class:`AttentionRecorder`.
    progress
        Show a bar with the time left.
    generate_options
        Passed to ``model.generate``; ``max_new_tokens`` is required.
    """
    result = Generated(sequence_scores=[] if sequence_scores else None)
    returned = generate_options.get("num_return_sequences", 1)
    with tqdm(total=len(prompts), unit="doc", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            inputs = encode(
                tokenizer,
                batch,
                padding=padding,
                max_length=max_prompt_tokens if padding == "max_length" else None,
                return_token_type_ids=False,
                return_tensors="pt",
            ).to(model.device)
            prompt_length = inputs["input_ids"].shape[1]
            options = dict(generate_options)
            if max_total_tokens is not None:
                room = max(1, max_total_tokens - prompt_length)
                options["max_new_tokens"] = min(options["max_new_tokens"], room)

            cache = KeyformerCache(model.config, config)
            after_prompt = _AfterPrompt(cache)
            if attentions is not None:
                folder, of_prompt, of_decode = attentions
                recorder = AttentionRecorder(prompt=of_prompt, decode=of_decode)
                cache.observer = recorder
            began = time.perf_counter()
            output = model.generate(
                **inputs,
                past_key_values=cache,
                stopping_criteria=[after_prompt],
                return_dict_in_generate=True,
                output_scores=sequence_scores,
                **options,
            )
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            result.seconds += time.perf_counter() - began

            new_tokens = output.sequences[:, prompt_length:]
            lengths = _lengths(ends_text(new_tokens, model, options))
            result.tokens += int(lengths.sum())
            result.kv_bytes_prompt.append(after_prompt.bytes or cache.memory_bytes())
            result.kv_bytes_end.append(cache.memory_bytes())
            texts = tokenizer.batch_decode(
                output.sequences if include_prompt else new_tokens,
                skip_special_tokens=not include_special_tokens,
            )
            result.texts += [texts[i : i + returned] for i in range(0, len(texts), returned)]
            if result.sequence_scores is not None:
                scores = _sequence_scores(model, output, lengths)
                result.sequence_scores += [
                    scores[i : i + returned] for i in range(0, len(scores), returned)
                ]
            if attentions is not None:
                recorder.save(folder / f"{start:06d}.npz")
            bar.update(len(batch))
    return result


def ends_text(tokens: Tensor, model: PreTrainedModel, options: dict[str, Any]) -> Tensor:
    """Which tokens are the end-of-sequence token of ``generate(**options)``; bool, same shape."""
    eos = options.get("eos_token_id", model.generation_config.eos_token_id)
    return torch.isin(tokens, torch.as_tensor(eos if eos is not None else -1).to(tokens))


def _lengths(ended: Tensor) -> Tensor:
    """Tokens of each sequence up to its end-of-sequence token, that one included."""
    before_end = ended.cumsum(dim=-1) - ended.to(torch.int64) == 0
    return before_end.sum(dim=-1)


def _sequence_scores(model: PreTrainedModel, output: Any, lengths: Tensor) -> list[float]:
    if output.get("sequences_scores") is not None:
        return output.sequences_scores.tolist()
    steps = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    counted = torch.arange(steps.shape[1], device=steps.device) < lengths[:, None]
    return (steps.masked_fill(~counted, 0).sum(dim=-1) / lengths).tolist()
