"""A model for lm-eval whose context is evicted to the budget before a continuation is scored."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from keyformer.cache import KeyformerCache
from keyformer.config import UNLIMITED, InputError, KeyformerConfig
from keyformer.integration import check_device, enable_keyformer, load_model
from keyformer.modeling import position_inputs
from keyformer.quantize import weight_bytes
from keyformer_lm_eval import register

LOGGER = logging.getLogger(__name__)

T = TypeVar("T")
Tokens = tuple[int, ...]
Score = tuple[float, bool]
"""The log-probability of a continuation, and whether greedy decoding would give it."""


class KeyformerLM(HFLM):
    """Any method of the paper under any task of lm-eval.

    Requests are tokenized, cut to ``max_length`` and generated for as lm-eval's own "hf" model
    does, so that method "full" gives its numbers. Under the other methods

    - loglikelihood: the context is the prompt, evicted to k, a percentage of its own tokens; the
      continuation's first token is predicted by the prompt's last, the others one by one over the
      evicting cache. Continuations of the same context share its prompt.
    - generate_until: ``generate``, which evicts.
    - loglikelihood_rolling: the text flows through a cache of k slots, a percentage of all its
      tokens, ``prefill_chunk`` tokens at a time or one; what is beyond k is evicted as it flows.

    Noise depends on a sequence's row, so that keyformer's numbers change with the batch size as
    they do with the seed.

    Parameters
    ----------
    pretrained
        A checkpoint folder or a name on the hub.
    method
        A key of ``keyformer.config.METHODS``.
    dtype, quantize, use_fast_tokenizer
        Those of :func:`keyformer.load_model`.
    device
        As "hf" takes it: one that the machine lacks, such as the "cuda:0" of lm-eval's command,
        stands for a GPU if there is one, else the CPU.
    parallelize
        Spread the layers over all GPUs.
    batch_size
        Sequences in a forward call, or "auto" for as many as fit.
    max_batch_size, max_length, truncation, add_bos_token, prefix_token_id
        Those of lm-eval's "hf" model. ``max_length`` is 2048 where a model has no table of
        positions, which is then no limit of the model.
    settings
        Any other field of KeyformerConfig; the seed is 0 unless given.

    Raises
    ------
    InputError
        If there is no such method or setting, a value is out of range, or the checkpoint cannot
        be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "keyformer",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        quantize: str | None = None,
        use_fast_tokenizer: bool = True,
        parallelize: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        truncation: bool = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **settings: Any,
    ) -> None:
        config = KeyformerConfig.preset(method, **{"seed": 0, **settings})
        model, tokenizer = load_model(
            pretrained,
            config,
            dtype=dtype,
            device=_device(device),
            device_map="auto" if parallelize else None,
            quantize=quantize,
            use_fast_tokenizer=use_fast_tokenizer,
        )
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            truncation=truncation,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        self.pretrained = pretrained

    @property
    def keyformer_config(self) -> KeyformerConfig:
        """The method; another one can be set."""
        return self.model.get_decoder().keyformer_config

    @keyformer_config.setter
    def keyformer_config(self, config: KeyformerConfig) -> None:
        enable_keyformer(self.model, config)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model, and the bytes of its weights."""
        return {**super().get_model_info(), "weight_bytes": weight_bytes(self.model)}

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Score]:
        """Score continuations; requests are (texts, context tokens, continuation tokens)."""
        asked: dict[Tokens, dict[Tokens, list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            # The last token is predicted and not fed, so there is room for one more.
            text = tuple(context + continuation)[-(self.max_length + 1) :]
            start = len(text) - len(continuation)
            if start < 1:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens is longer than"
                    f" max_length {self.max_length}"
                )
            asked.setdefault(text[:start], {}).setdefault(text[start:], []).append(index)
        cut = sum(len(context + end) > self.max_length + 1 for _, context, end in requests)
        if cut:
            LOGGER.warning("%d requests lose their beginning: max_length %d", cut, self.max_length)
        results: list[Score] = [(0.0, False)] * len(requests)
        rows = override_bs or self._rows()
        with tqdm(total=len(requests), desc="Keyformer", disable=disable_tqdm) as bar:
            for contexts in batches(sorted(asked, key=len, reverse=True), rows):
                cache, predicted = self._prefill(contexts)
                pairs = [(row, end) for row, one in enumerate(contexts) for end in asked[one]]
                pairs.sort(key=lambda pair: -len(pair[1]))
                for part in batches(pairs, rows):
                    taken = torch.tensor([row for row, _ in part], device=self.device)
                    own = copy.deepcopy(cache)
                    own.batch_select_indices(taken)
                    scores = self._score(own, predicted[taken], [end for _, end in part])
                    for (row, end), score in zip(part, scores, strict=True):
                        for index in asked[contexts[row]][end]:
                            results[index] = score
                            if requests[index][0] is not None:
                                self.cache_hook.add_partial(
                                    "loglikelihood", requests[index][0], score
                                )
                            bar.update()
        return results

    def _prefill(self, contexts: Sequence[Tokens]) -> tuple[KeyformerCache, Tensor]:
        """A batch of prompts: their cache, and the logits (batch, vocabulary) after them."""
        ids, real = self._padded(contexts, side="left")
        cache = KeyformerCache(self.model.config, self.keyformer_config)
        output = self.model(
            ids,
            attention_mask=real,
            past_key_values=cache,
            logits_to_keep=1,
            **position_inputs(self.model, real),
        )
        return cache, output.logits[:, -1]

    def _score(
        self, cache: KeyformerCache, predicted: Tensor, continuations: Sequence[Tokens]
    ) -> list[Score]:
        """Feed continuations token by token; the longest come first, so that rows end in turn.

        Parameters
        ----------
        predicted
            (batch, vocabulary) logits of each first token.
        """
        tokens, _ = self._padded(continuations, side="right")
        total = torch.zeros(len(tokens), device=self.device)
        greedy = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        lengths = [len(one) for one in continuations]
        for step in range(lengths[0]):
            going = sum(length > step for length in lengths)
            if step:
                if going < len(predicted):
                    cache.batch_select_indices(torch.arange(going))
                fed = tokens[:going, step - 1 : step]
                output = self.model(fed, attention_mask=torch.ones_like(fed), past_key_values=cache)
                predicted = output.logits[:, -1]
            target = tokens[:going, step]
            total[:going] += log_probability(predicted, target)
            greedy[:going] &= predicted.argmax(dim=-1) == target
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    @torch.no_grad()
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts; what exceeds ``max_length`` comes in hf's windows."""
        windows = []
        for index, request in enumerate(requests):
            (string,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context, scored = make_disjoint_window(window)
                windows.append((index, tuple(context + scored), len(scored)))
        windows.sort(key=lambda window: -len(window[1]))
        totals = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="Keyformer", disable=disable_tqdm) as bar:
            for batch in batches(windows, self._rows()):
                flowed = self._stream([text for _, text, _ in batch], [n for _, _, n in batch])
                for (index, _, _), total in zip(batch, flowed, strict=True):
                    totals[index] += total
                bar.update(len(batch))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _stream(self, texts: Sequence[Tokens], scored: Sequence[int]) -> list[float]:
        """Log-probability of the last ``scored`` tokens of each text, fed as one long prompt."""
        tokens, real = self._padded(texts, side="right")
        fed, asked = real[:, 1:], real.flip(1).cumsum(dim=1).flip(1)[:, 1:]
        asked = fed & (asked <= torch.tensor(scored, device=self.device)[:, None])
        cache = KeyformerCache(self.model.config, self.keyformer_config)
        cache.expect(fed)
        chunk = self.keyformer_config.prefill_chunk
        if chunk is None:
            never = self.keyformer_config.kv_budget == UNLIMITED
            chunk = fed.shape[1] if never else 1
        total = torch.zeros(len(tokens), device=self.device)
        for start in range(0, fed.shape[1], chunk):
            part = slice(start, min(start + chunk, fed.shape[1]))
            logits = self.model(
                tokens[:, :-1][:, part], attention_mask=fed[:, part], past_key_values=cache
            ).logits
            found = log_probability(logits, tokens[:, 1:][:, part])
            total += found.masked_fill(~asked[:, part], 0.0).sum(dim=1)
        return total.tolist()

    def _padded(self, rows: Sequence[Tokens], side: str) -> tuple[Tensor, Tensor]:
        """Tokens (batch, longest) int64 and which of them are real, bool."""
        ids = [torch.tensor(row, device=self.device) for row in rows]
        options: dict[str, Any] = {"batch_first": True, "padding_side": side}
        real = pad_sequence([torch.ones_like(row) for row in ids], padding_value=0, **options)
        pad = self.tokenizer.pad_token_id
        return pad_sequence(ids, padding_value=pad, **options), real.to(torch.bool)

    def _rows(self) -> int:
        """Sequences in a forward call."""
        return self._detect_batch_size() if self.batch_size == "auto" else self.batch_size


def _device(device: str | None) -> torch.device:
    """The device of that name or, where the machine lacks it, a GPU or the CPU, with a note.

    Raises
    ------
    InputError
        If the name is none that lm-eval's "hf" model knows.
    """
    try:
        return check_device(device)
    except InputError:
        if not re.fullmatch(r"(cuda|mps|npu|xpu|hpu)(:\d+)?", str(device)):
            raise
        found = check_device(None)
        LOGGER.warning("there is no device %s here, the model is put on %s", device, found)
        return found


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each token under its logits, float32, the shape of ``tokens``."""
    known = torch.log_softmax(logits.float(), dim=-1)
    return known.gather(-1, tokens[..., None])[..., 0]


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, ``size`` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


register()
