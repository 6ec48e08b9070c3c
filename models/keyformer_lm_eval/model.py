"""A model for lm-eval whose context is evicted to the budget before a continuation is scored."""

from __future__ import annotations

import copy
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from keyformer.cache import KeyformerCache
from keyformer.config import UNLIMITED, InputError, KeyformerConfig
from keyformer.integration import check_device, enable_keyformer, load_model
from keyformer.modeling import position_inputs
from keyformer.quantize import weight_bytes
from keyformer_evaluation.records.identity import (
    Settings,
    environment,
    item_keys,
    noise_id,
    own_code,
    weights_hash,
)
from keyformer_evaluation.records.processes import processes
from keyformer_evaluation.records.results import source
from keyformer_evaluation.records.store import Store
from keyformer_evaluation.records.work import LOOK, distinct
from keyformer_lm_eval import register
from keyformer_lm_eval.processes import share_alike

LOGGER = logging.getLogger(__name__)

OF_HF = ("max_length", "truncation", "add_bos_token", "prefix_token_id")
"""Arguments that go to lm-eval's "hf" model as they are."""

T = TypeVar("T")
R = TypeVar("R")
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

    Noise goes by the tokens of a context, so that numbers do not depend on what is beside it.

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
        stands for a GPU if there is one, else the CPU. Several processes have their own.
    parallelize
        Spread the layers over all GPUs.
    share
        Under ``accelerate launch``, take one of the processes' shares of the requests on its
        device; False leaves the processes alone.
    batch_size
        Sequences in a forward call; "auto" for as many of the longest requests as fit, found once;
        "auto:N" to find it N times while they get shorter.
    max_batch_size
        That of lm-eval's "hf" model.
    options
        ``max_length``, ``truncation``, ``add_bos_token`` and ``prefix_token_id`` of lm-eval's "hf"
        model; ``max_length`` is 2048 where a model has no table of positions, which is then no
        limit of the model. Any other is a field of KeyformerConfig; the seed is 0 unless given.

    Attributes
    ----------
    store
        Where finished requests are kept and looked up; at first one in memory.
    resume
        Whether what the store has counts.
    keys, kept
        What the answers so far are kept under, and how many of them were in the store before.

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
        share: bool = True,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **options: Any,
    ) -> None:
        if not re.fullmatch(r"0*[1-9]\d*|auto(:\d+(\.\d+)?)?", str(batch_size)):
            raise InputError(f"batch_size must be a number, auto or auto:N, got {batch_size!r}")
        if max_batch_size < 1:
            raise InputError(f"max_batch_size must be at least 1, got {max_batch_size}")
        state = processes()
        shared = share and state.num_processes > 1
        if shared and parallelize:
            raise InputError("parallelize gives one process all GPUs, and there are several")
        if shared and not state.is_main_process:
            disable_progress_bar()
        of_hf = {name: options.pop(name) for name in OF_HF if name in options}
        config = KeyformerConfig.preset(method, **{"seed": 0, **options})
        model, tokenizer = load_model(
            pretrained,
            config,
            dtype=dtype,
            device=state.device if shared else _device(device),
            device_map="auto" if parallelize else None,
            quantize=quantize,
            use_fast_tokenizer=use_fast_tokenizer,
        )
        with _silent(HFLM.__module__):  # which warns of launchers and of a loaded model
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **of_hf,
            )
        self.pretrained = pretrained
        self.store, self.resume = Store(None), True
        self.keys: list[str] = []
        self.kept = 0
        self._loaded = {"quantize": quantize, "fast tokenizer": use_fast_tokenizer}
        if shared:
            share_alike()
            self.accelerator = Accelerator()
            self._rank, self._world_size = state.process_index, state.num_processes

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
        # The continuations of a context are told its prompt once.
        contexts = sorted(asked, key=len, reverse=True)
        items = [(context, sorted(asked[context])) for context in contexts]

        def run(batch: Sequence[Any], rows: int) -> list[list[Score]]:
            cache, predicted = self._prefill([context for context, _ in batch])
            pairs = [(row, end) for row, (_, ends) in enumerate(batch) for end in ends]
            pairs.sort(key=lambda pair: -len(pair[1]))
            found: dict[tuple[int, Tokens], Score] = {}
            for part in batches(pairs, rows):
                taken = torch.tensor([row for row, _ in part], device=self.device)
                own = copy.deepcopy(cache)
                own.batch_select_indices(taken)
                scores = self._score(own, predicted[taken], [end for _, end in part])
                found |= zip(part, scores, strict=True)
            return [[found[row, end] for end in ends] for row, (_, ends) in enumerate(batch)]

        results: list[Score] = [(0.0, False)] * len(requests)
        answers = self._each("loglikelihood", items, run, disable_tqdm)
        for (text, ends), scores in zip(items, answers, strict=True):
            for end, (total, greedy) in zip(ends, scores, strict=True):
                for index in asked[text][end]:
                    results[index] = total, greedy
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial(
                            "loglikelihood", requests[index][0], results[index]
                        )
        return results

    def _cache(self, contexts: Sequence[Tokens]) -> KeyformerCache:
        """An empty cache for a batch of texts that begin with these tokens."""
        ids = [noise_id(list(context)) for context in contexts]
        return KeyformerCache(self.model.config, self.keyformer_config, ids)

    def _prefill(self, contexts: Sequence[Tokens]) -> tuple[KeyformerCache, Tensor]:
        """A batch of prompts: their cache, and the logits (batch, vocabulary) after them."""
        ids, real = self._padded(contexts, side="left")
        cache = self._cache(contexts)
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

        def run(batch: Sequence[tuple[Tokens, int]], _: int) -> list[float]:
            return self._stream([text for text, _ in batch], [scored for _, scored in batch])

        items = [(text, scored) for _, text, scored in windows]
        flowed = self._each("loglikelihood_rolling", items, run, disable_tqdm)
        for (index, _, _), total in zip(windows, flowed, strict=True):
            totals[index] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _stream(self, texts: Sequence[Tokens], scored: Sequence[int]) -> list[float]:
        """Log-probability of the last ``scored`` tokens of each text, fed as one long prompt."""
        tokens, real = self._padded(texts, side="right")
        fed, asked = real[:, 1:], real.flip(1).cumsum(dim=1).flip(1)[:, 1:]
        asked = fed & (asked <= torch.tensor(scored, device=self.device)[:, None])
        cache = self._cache(texts)
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

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """hf's texts, the longest prompts first."""
        generate, size = super().generate_until, self.batch_size
        order = sorted(
            range(len(requests)), key=lambda index: -len(self.tok_encode(requests[index].args[0]))
        )
        of = {_plain(requests[index].args): requests[index] for index in order}

        def run(batch: Sequence[str], rows: int) -> list[str]:
            self.batch_size_per_gpu = rows
            try:
                return generate([of[one] for one in batch], disable_tqdm=True)
            finally:
                self.batch_size_per_gpu = size

        items = [_plain(requests[index].args) for index in order]
        texts = [""] * len(requests)
        answers = self._each("generate_until", items, run, disable_tqdm)
        for index, text in zip(order, answers, strict=True):
            texts[index] = text
        return texts

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """hf's ``generate``, over a cache of this model's making."""
        real = options["attention_mask"].bool()
        contexts = [tuple(row[kept].tolist()) for row, kept in zip(context, real, strict=True)]
        return super()._model_generate(
            context, max_length, stop, past_key_values=self._cache(contexts), **options
        )

    def _padded(self, rows: Sequence[Tokens], side: str) -> tuple[Tensor, Tensor]:
        """Tokens (batch, longest) int64 and which of them are real, bool."""
        ids = [torch.tensor(row, device=self.device) for row in rows]
        options: dict[str, Any] = {"batch_first": True, "padding_side": side}
        real = pad_sequence([torch.ones_like(row) for row in ids], padding_value=0, **options)
        pad = self.tokenizer.pad_token_id
        return pad_sequence(ids, padding_value=pad, **options), real.to(torch.bool)

    def _each(
        self,
        kind: str,
        items: Sequence[T],
        run: Callable[[Sequence[T], int], Sequence[R]],
        disable_tqdm: bool,
    ) -> list[R]:
        """What ``run`` gives for each item, from the store or a batch at a time.

        Where the batch size is "auto", the first items tell how many fit: ``max_batch_size``, or
        half as often as memory runs out. That is kept for later calls. "auto:N" starts from
        ``max_batch_size`` N times on the way to the last.

        Parameters
        ----------
        kind
            Of request.
        items
            JSON-like, those that take long first.
        run
            Called with some of the items and how many sequences a forward call may have.
        """
        keys = item_keys(self._setting(kind), items)
        here = source(self.device)
        if not self.resume:
            self.store.forget(keys)
        done = self.store.done(keys)
        self.keys += keys
        self.kept += sum(key in done for key in keys)
        with tqdm(
            total=len(items), desc="Keyformer", disable=disable_tqdm or self.rank != 0
        ) as bar:
            while left := [at for at in distinct(keys) if keys[at] not in done]:
                bar.update(sum(key in done for key in keys) - bar.n)
                part = int((len(items) - len(left)) * self.batch_schedule / len(items))
                auto = self.batch_size == "auto"
                rows = self.batch_sizes.get(part, self.max_batch_size) if auto else self.batch_size
                claimed = self.store.claim([keys[at] for at in left], rows)
                if not claimed:  # another process has the rest
                    time.sleep(LOOK)
                    done = self.store.done(keys)
                    continue
                taken = [at for at in left if keys[at] in claimed]
                results = self._attempt(run, [items[at] for at in taken], rows)
                if auto:
                    self.batch_sizes[part] = rows if results is not None else rows // 2
                if results is None:
                    release_memory()  # after the error is gone, which holds on to tensors
                    continue
                found = zip(taken, results, strict=True)
                self.store.add({keys[at]: {"answer": answer} for at, answer in found}, here)
                done |= claimed
            bar.update(len(items) - bar.n)
        answers = self.store.results(keys)
        return [answers[key]["answer"] for key in keys]

    def _attempt(
        self, run: Callable[[Sequence[T], int], Sequence[R]], batch: Sequence[T], rows: int
    ) -> Sequence[R] | None:
        """What ``run`` gives; None if the memory is too small and fewer rows can be tried."""
        try:
            return run(batch, rows)
        except RuntimeError as error:
            if self.batch_size != "auto" or not should_reduce_batch_size(error):
                raise
            if rows == 1:
                raise InputError(f"one sequence is too much for the memory: {error}") from error
            return None

    def _setting(self, kind: str) -> Settings:
        """All that the answer to a request depends on beside it."""
        if self.store.path is None:
            return {}
        config = self.keyformer_config
        return {
            "request": kind,
            "weights": weights_hash(self.pretrained),
            "dtype": str(self.model.dtype),
            **self._loaded,
            "max_length": self.max_length,
            "config": {**config.plain(), "seed": config.seed if config.draws_noise else None},
            "lm_eval": version("lm_eval"),
            **environment(self.device, __name__),
            **own_code(config),
        }


def _plain(arguments: tuple[Any, ...]) -> str:
    """A request's arguments as JSON."""
    return json.dumps(arguments, sort_keys=True, default=str)


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


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without what a logger has to say."""
    logger = logging.getLogger(name)
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each token under its logits, float32, the shape of ``tokens``."""
    known = torch.log_softmax(logits.float(), dim=-1)
    return known.gather(-1, tokens[..., None])[..., 0]


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, ``size`` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


register()
