"""The generation loop: prompts in, texts out, with time and cache size measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from keyformer.cache import KeyformerCache
from keyformer.config import KeyformerConfig
from keyformer_evaluation.records.identity import noise_id
from keyformer_evaluation.tasks.attentions import AttentionRecorder
from keyformer_evaluation.tasks.data import prompt_tokens


@dataclass(frozen=True)
class Generated:
    """What was generated for one prompt.

    Attributes
    ----------
    texts
        Its ``num_return_sequences`` texts, best first.
    sequence_scores
        Each text's log-probability divided by its length; None unless asked for.
    tokens
        Generated tokens over all texts, end-of-sequence tokens included.
    seconds, kv_bytes_prompt, kv_bytes_end
        The prompt's share of its batch: time in ``generate``, and bytes of the cache, all beams
        of it, after the prompt and after the last token.
    """

    texts: list[str]
    sequence_scores: list[float] | None
    tokens: int
    seconds: float
    kv_bytes_prompt: float
    kv_bytes_end: float


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
    seed: int = 0,
    **options: Any,
) -> list[Generated]:
    """Generate a continuation of each prompt under one method.

    What a prompt gets depends on itself and on the seeds, not on the prompts beside it: noise goes
    by its content, and where tokens are sampled each prompt is generated for by itself.

    Parameters
    ----------
    config
        The method; each batch gets a KeyformerCache of its own. Its seed is that of the noise.
    seed
        Of sampling.
    options
        Those of :func:`generate_batch`.
    """
    samples = options.get("do_sample", False)
    at_a_time = 1 if samples else batch_size
    found: list[Generated] = []
    for start in range(0, len(prompts), at_a_time):
        batch = prompts[start : start + at_a_time]
        if samples:
            torch.manual_seed(seed << 32 | noise_id(batch[0]))
        found += generate_batch(model, tokenizer, batch, config, **options)
    return found


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: KeyformerConfig,
    *,
    start_token: int | None = None,
    padding: bool | str = True,
    max_prompt_tokens: int | None = None,
    max_total_tokens: int | None = None,
    include_prompt: bool = False,
    include_special_tokens: bool = False,
    clean_up_spaces: bool = False,
    sequence_scores: bool = False,
    attentions: tuple[Path, bool, bool] | None = None,
    **generate_options: Any,
) -> list[Generated]:
    """Generate for prompts at once.

    Parameters
    ----------
    start_token
        What every prompt begins with: see :func:`.data.prompt_tokens`.
    padding, max_prompt_tokens
        As the tokenizer's ``padding`` and ``max_length``; prompts are not cut here.
    max_total_tokens
        Bound on prompt and generated tokens together, beside ``max_new_tokens``.
    include_prompt, include_special_tokens
        What the texts contain beside the generated words.
    clean_up_spaces
        Whether spaces before punctuation and contractions are dropped.
    sequence_scores
        Fill in ``Generated.sequence_scores``.
    attentions
        A file, and whether to save there the weights of the prompt and of decode steps, see
        :class:`AttentionRecorder`.
    generate_options
        Passed to ``model.generate``; ``max_new_tokens`` is required.
    """
    inputs = tokenizer.pad(
        {"input_ids": prompt_tokens(tokenizer, prompts, start_token)},
        padding=padding,
        max_length=max_prompt_tokens if padding == "max_length" else None,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    options = dict(generate_options)
    if max_total_tokens is not None:
        room = max(1, max_total_tokens - prompt_length)
        options["max_new_tokens"] = min(options["max_new_tokens"], room)

    cache = KeyformerCache(model.config, config, noise_ids=[*map(noise_id, prompts)])
    after_prompt = _AfterPrompt(cache)
    if attentions is not None:
        file, of_prompt, of_decode = attentions
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
    seconds = time.perf_counter() - began
    if attentions is not None:
        recorder.save(file)

    new_tokens = output.sequences[:, prompt_length:]
    lengths = _lengths(ends_text(new_tokens, model, options))
    texts = tokenizer.batch_decode(
        output.sequences if include_prompt else new_tokens,
        skip_special_tokens=not include_special_tokens,
    )
    if clean_up_spaces:  # here, as decoding does not do so with BPE whatever it is told
        texts = [*map(tokenizer.clean_up_tokenization, texts)]
    scores = _sequence_scores(model, output, lengths) if sequence_scores else None
    share, each = 1 / len(prompts), len(texts) // len(prompts)
    return [
        Generated(
            texts=texts[at : at + each],
            sequence_scores=None if scores is None else scores[at : at + each],
            tokens=int(lengths[at : at + each].sum()),
            seconds=share * seconds,
            kv_bytes_prompt=share * (after_prompt.bytes or cache.memory_bytes()),
            kv_bytes_end=share * cache.memory_bytes(),
        )
        for at in range(0, len(texts), each)
    ]


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
