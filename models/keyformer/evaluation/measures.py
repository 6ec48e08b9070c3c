"""What sweeps measure of a configuration, item by item, on a model and a dataset."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from keyformer.attention import Attended
from keyformer.cache import KeyformerCache
from keyformer.config import InputError, KeyformerConfig
from keyformer.evaluation.data import TASKS, Item, make_prompt, prompt_room
from keyformer.evaluation.generation import generate
from keyformer.evaluation.identity import Settings, noise_id
from keyformer.evaluation.rouge import rouge
from keyformer.evaluation.store import Result
from keyformer.integration import load_model
from keyformer.modeling import position_inputs

NEGLIGIBLE = 0.01
"""A weight below this share of its query's largest counts as zero (sparsity of Fig. 3a)."""

SHARES = tuple(range(5, 101, 5))
"""Percent of the tokens, at which the attention mass is summed up (Fig. 3b)."""


@dataclass(frozen=True)
class OnItems(ABC):
    """A model, a task and its items; the base of what is measured on them.

    Attributes
    ----------
    path, dtype
        What :func:`keyformer.load_model` loads.
    task
        Key of ``TASKS``.
    items
        Of a dataset of that task.
    bs
        Batch size.
    beam, max_new_tokens
        Of generation.
    """

    path: str
    dtype: str
    task: str
    items: list[Item]
    bs: int
    beam: int
    max_new_tokens: int

    depends_on: ClassVar[tuple[str, ...]] = ("dtype", "task", "bs")
    calls: ClassVar[Any]
    """How often an item calls the model, about."""

    @property
    def setting(self) -> Settings:
        """What the results depend on beside configuration, item, code and device."""
        return {name: getattr(self, name) for name in self.depends_on}

    @property
    def contents(self) -> list[Item]:
        """The items."""
        return self.items

    @property
    def costs(self) -> list[float]:
        """How long each item takes, in no unit: a call counts as much as a document to read."""
        return [self.calls + characters / 2000 for characters in self._characters]

    @property
    def _characters(self) -> list[int]:
        return [len(item[TASKS[self.task].document]) for item in self.items]

    @abstractmethod
    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Measure a configuration, which has a seed, on some items."""

    def load(self, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer."""
        return _load(self.path, self.dtype, device)

    def prompt(self, item: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
        """An item's prompt, cut where the model's table of positions ends."""
        room = prompt_room(model, self.max_new_tokens)
        return make_prompt(self.items[item], TASKS[self.task], tokenizer, room)


@dataclass(frozen=True)
class Rouge(OnItems):
    """rouge1, rouge2 and rougeL of generated texts."""

    depends_on = ("dtype", "task", "bs", "beam", "max_new_tokens")
    metrics: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")

    @property
    def setting(self) -> Settings:
        """What the results depend on, the packages that score among it."""
        return {**super().setting, **{name: version(name) for name in ("rouge-score", "nltk")}}

    @property
    def calls(self) -> int:
        """One a token."""
        return self.max_new_tokens

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Generate and score."""
        model, tokenizer = self.load(device)
        task, documents = TASKS[self.task], [self.items[item] for item in items]
        generated = generate(
            model,
            tokenizer,
            [self.prompt(item, model, tokenizer) for item in items],
            config,
            batch_size=self.bs,
            num_beams=self.beam,
            max_new_tokens=self.max_new_tokens,
        )
        scores = rouge(
            [task.scored(item, of.texts[0]) for item, of in zip(documents, generated, strict=True)],
            [task.scored(item, task.reference(item)) for item in documents],
        )
        return [{metric: round(of[metric], 4) for metric in self.metrics} for of in scores]


@dataclass(frozen=True)
class Likelihood(OnItems):
    """bits: of a token, on average, in the second half of a document.

    The first half, after what the task's prompt has before it, is the prompt and is evicted
    to the budget; the second is fed token by token, each evicting another.
    """

    @property
    def calls(self) -> float:
        """One a token of half a document; a token has about four characters."""
        return max(self._characters) / 8

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Predict."""
        model, tokenizer = self.load(device)
        halves = [self._halves(self.items[item], tokenizer) for item in items]
        ids = [noise_id(self.items[item]) for item in items]
        return [{"bits": bits} for bits in self._bits(model, tokenizer, halves, ids, config)]

    def _halves(
        self, item: Item, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[int], list[int]]:
        task = TASKS[self.task]
        before, document, _ = task.prompt(item).partition(item[task.document])
        opening = tokenizer(before, verbose=False)["input_ids"] if before else []
        tokens = tokenizer(document, verbose=False, add_special_tokens=not before)["input_ids"]
        middle = len(tokens) // 2
        return opening + tokens[:middle], tokens[middle:]

    @torch.no_grad()
    def _bits(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        halves: list[tuple[list[int], list[int]]],
        noise_ids: list[int],
        config: KeyformerConfig,
    ) -> list[float]:
        first = tokenizer.pad(
            {"input_ids": [prompt for prompt, _ in halves]}, return_tensors="pt"
        ).to(model.device)
        lengths = torch.tensor([len(rest) for _, rest in halves])
        second = torch.zeros(len(halves), int(lengths.max()), dtype=torch.int64)
        for row, (_, rest) in enumerate(halves):
            second[row, : len(rest)] = torch.tensor(rest)
        second, lengths = second.to(model.device), lengths.to(model.device)
        real = torch.arange(second.shape[1], device=model.device) < lengths[:, None]
        cache = KeyformerCache(model.config, config, noise_ids)
        cache.max_new_tokens = second.shape[1]  # T of Eq. 10
        places = position_inputs(model, first["attention_mask"])
        logits = model(**first, **places, past_key_values=cache, logits_to_keep=1).logits
        total = torch.zeros(len(halves), device=model.device)
        for step in range(second.shape[1]):
            token = second[:, step]
            lost = torch.nn.functional.cross_entropy(logits[:, -1].float(), token, reduction="none")
            total += lost.masked_fill(~real[:, step], 0)
            if step + 1 < second.shape[1]:
                logits = model(
                    input_ids=token[:, None],
                    attention_mask=real[:, step : step + 1],
                    past_key_values=cache,
                ).logits
        return [round(value, 5) for value in (total / lengths / math.log(2)).tolist()]


@dataclass(frozen=True)
class Attention(OnItems):
    """How the tokens of the reference attend to the prompt and to each other.

    layer00, layer01, ...: percent of the weights below ``NEGLIGIBLE`` of their query's largest
    (Fig. 3a). mass005, ... mass100: percent of the attention on that percent of the tokens,
    those of largest weight, the mean over queries, heads and layers (Fig. 3b). Of a
    configuration that evicts nothing.
    """

    depends_on = ("dtype", "task", "max_new_tokens")

    calls = 2

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Attend."""
        model, tokenizer = self.load(device)
        found = (
            self._of(
                self.items[item], self.prompt(item, model, tokenizer), model, tokenizer, config
            )
            for item in items
        )
        return [{name: round(value, 4) for name, value in of.items()} for of in found]

    def _of(
        self,
        item: Item,
        prompt: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: KeyformerConfig,
    ) -> dict[str, float]:
        reference = TASKS[self.task].reference(item)
        read = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        written = tokenizer(reference, add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = written[:, : self.max_new_tokens - 1].to(model.device)
        sparse: list[Tensor] = []
        masses: list[Tensor] = []

        def look(layer: int, query_positions: Tensor, attended: Attended) -> None:
            weights, positions = attended.weights, attended.positions[:, :1, None]
            assert weights is not None
            ahead = positions > query_positions[:, None, :, None]
            seen = ~ahead & (positions >= 0)
            largest = weights.amax(dim=-1, keepdim=True)
            small = (weights < NEGLIGIBLE * largest) & seen
            sparse.append(small.sum() / (seen.sum() * weights.shape[1]))
            known = seen.sum(dim=-1)
            summed = weights.sort(dim=-1, descending=True).values.cumsum(dim=-1)
            shares = torch.tensor(SHARES, device=weights.device) / 100
            count = (shares * known[..., None]).round().to(torch.int64).clamp(min=1) - 1
            masses.append(summed.gather(-1, count.expand(*summed.shape[:3], -1)).mean((0, 1, 2)))

        cache = KeyformerCache(model.config, config)
        cache.max_new_tokens = self.max_new_tokens
        with torch.no_grad():
            model(**read, past_key_values=cache, logits_to_keep=1)
            cache.observer = look
            model(input_ids=written, past_key_values=cache, logits_to_keep=1)
        mass = torch.stack(masses).mean(dim=0)
        by_layer = {f"layer{i:02}": 100 * float(share) for i, share in enumerate(sparse)}
        return by_layer | {f"mass{s:03}": 100 * float(m) for s, m in zip(SHARES, mass, strict=True)}


@dataclass(frozen=True)
class Softmax(OnItems):
    """What one head of the first item's first new token attends to (Fig. 4).

    position: of each token in the cache and of the new one, in order; weight: its share.
    The new token is the first of the reference, so it is the same under every configuration.
    """

    layer: int = 0
    head: int = 0

    depends_on = ("dtype", "task", "max_new_tokens", "layer", "head")
    calls = 2

    @property
    def contents(self) -> list[Item]:
        """The first item."""
        return self.items[:1]

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Attend."""
        model, tokenizer = self.load(device)
        prompt = self.prompt(0, model, tokenizer)
        reference = TASKS[self.task].reference(self.items[0])
        read = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        written = tokenizer(reference, add_special_tokens=False, return_tensors="pt")["input_ids"]
        seen: dict[int, Attended] = {}
        cache = KeyformerCache(model.config, config, [noise_id(self.items[0])])
        cache.max_new_tokens = self.max_new_tokens
        with torch.no_grad():
            model(**read, past_key_values=cache, logits_to_keep=1)
            cache.observer = lambda layer, _, attended: seen.update({layer: attended})
            model(input_ids=written[:, :1].to(model.device), past_key_values=cache)
        attended = seen.get(self.layer)
        if attended is None:
            raise InputError(f"--layer must be from 0 to {len(seen) - 1}, got {self.layer}")
        assert attended.weights is not None
        if self.head >= attended.weights.shape[1]:
            most = attended.weights.shape[1] - 1
            raise InputError(f"--head must be from 0 to {most}, got {self.head}")
        weights = attended.weights[0, self.head, 0]
        heads, kv_heads = attended.weights.shape[1], attended.positions.shape[1]
        positions = attended.positions[0, self.head * kv_heads // heads]
        order = positions.argsort()[(positions < 0).sum() :]
        return [
            {
                "position": positions[order].tolist(),
                "weight": [round(weight, 7) for weight in weights[order].tolist()],
            }
        ]


@lru_cache(maxsize=1)
def _load(
    path: str, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    logging.disable_progress_bar()  # there is one over the runs
    return load_model(path, dtype=dtype, device=device)
