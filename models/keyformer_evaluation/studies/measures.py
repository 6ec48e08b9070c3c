"""What sweeps measure of a configuration, item by item, on a model and a dataset."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
from keyformer.integration import load_model
from keyformer_evaluation.records.identity import Settings, noise_id
from keyformer_evaluation.records.store import Result
from keyformer_evaluation.studies.feeding import Part, Tokens, judge, read, write
from keyformer_evaluation.tasks.data import (
    TASKS,
    Item,
    conversation,
    encode,
    make_prompt,
    prompt_kind,
    trained_room,
)
from keyformer_evaluation.tasks.generation import generate
from keyformer_evaluation.tasks.retrieval import AHEAD, CUT, answered
from keyformer_evaluation.tasks.rouge import rouge

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
        Of generation; the latter is T of Eq. 10 elsewhere.
    prompt_kind
        One of PROMPTS, or None for the default of
        :func:`keyformer_evaluation.tasks.data.prompt_kind`.
    max_prompt_tokens
        The longest prompt; None is as many as the positions leave room for.
    early_stopping, min_new_tokens
        Of generation.
    """

    path: str
    dtype: str
    task: str
    items: list[Item]
    bs: int
    beam: int
    max_new_tokens: int
    prompt_kind: str | None = None
    max_prompt_tokens: int | None = None
    early_stopping: bool = False
    min_new_tokens: int = 0

    depends_on: ClassVar[tuple[str, ...]] = ("dtype", "task", "bs")
    prompt_depends_on: ClassVar[tuple[str, ...]] = (
        *("prompt_kind", "max_new_tokens", "max_prompt_tokens"),
    )

    @property
    def setting(self) -> Settings:
        """What the results depend on beside configuration, item, code and device."""
        return {name: getattr(self, name) for name in self.depends_on}

    @property
    def contents(self) -> list[Item]:
        """The items."""
        return self.items

    @property
    def calls(self) -> float:
        """How often an item calls the model, about: once a token."""
        return self.max_new_tokens

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
        """An item's prompt, cut where the positions end that the model was trained with."""
        rooms = (trained_room(model, self.max_new_tokens), self.max_prompt_tokens)
        room = min((room for room in rooms if room is not None), default=None)
        task = TASKS[self.task]
        return make_prompt(self.items[item], task, tokenizer, room, self.prompt_kind)

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: KeyformerConfig,
        items: Sequence[int],
    ) -> tuple[KeyformerCache, Tensor]:
        """Feed items' prompts; their cache, and (batch, vocabulary) logits of what comes next."""
        prompts = [self.prompt(item, model, tokenizer) for item in items]
        texts = [[Part(encode(tokenizer, prompt)["input_ids"])] for prompt in prompts]
        return read(model, texts, config, [*map(noise_id, prompts)], self.max_new_tokens)


@dataclass(frozen=True)
class Rouge(OnItems):
    """rouge1, rouge2 and rougeL of generated texts."""

    depends_on = (
        *(*OnItems.depends_on, *OnItems.prompt_depends_on),
        *("beam", "early_stopping", "min_new_tokens"),
    )
    metrics: ClassVar[tuple[str, ...]] = ("rouge1", "rouge2", "rougeL")

    @property
    def setting(self) -> Settings:
        """What the results depend on, the packages that score among it."""
        return {**super().setting, **{name: version(name) for name in ("rouge-score", "nltk")}}

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
            min_new_tokens=self.min_new_tokens or None,
            early_stopping=self.early_stopping and self.beam > 1,
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
    to the budget; the second is fed token by token, each evicting another. What is beyond the
    positions that the model was trained with is cut off.
    """

    depends_on = (*OnItems.depends_on, "max_new_tokens")
    metric: ClassVar[str] = "bits"
    unit: ClassVar[float] = math.log(2)
    """Nats in one of the metric's."""

    @property
    def calls(self) -> float:
        """One a token of half a document; a token has about four characters."""
        return max(self._characters) / 8

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Predict."""
        model, tokenizer = self.load(device)
        room = trained_room(model, self.max_new_tokens)
        parted = [self._parted(self.items[item], tokenizer, room) for item in items]
        ids = [noise_id(self.items[item]) for item in items]
        read_first = [[Part(first)] for first, _ in parted]
        cache, logits = read(model, read_first, config, ids, self.max_new_tokens)
        judged = judge(model, cache, logits, [second for _, second in parted])
        return [{self.metric: round(float(lost.mean()) / self.unit, 5)} for lost, _ in judged]

    def _parted(
        self, item: Item, tokenizer: PreTrainedTokenizerBase, room: int | None
    ) -> tuple[Tokens, Tokens]:
        """What is read and what is predicted; ``room`` is that of a prompt."""
        task = TASKS[self.task]
        before, document, _ = task.prompt(item).partition(item[task.document])
        opening = tokenizer(before, verbose=False)["input_ids"] if before else []
        tokens = tokenizer(document, verbose=False, add_special_tokens=not before)["input_ids"]
        if room is not None:
            left = room + self.max_new_tokens - len(opening)
            if left < 2:
                raise InputError(
                    f"the positions of {self.path} leave no room for a document after the"
                    f" {len(opening)} tokens of its instruction"
                )
            tokens = tokens[:left]
        first = len(tokens) - self._predicted(len(tokens))
        return opening + tokens[:first], tokens[first:]

    def _predicted(self, tokens: int) -> int:
        """How many of a document's tokens, the last."""
        return tokens - tokens // 2


@dataclass(frozen=True)
class Continued(Likelihood):
    """nll: of a token that a document goes on with after what of it was read, in nats.

    As :class:`Likelihood`, for the last ``max_new_tokens``, or a half if that is fewer.
    """

    metric = "nll"
    unit = 1.0

    @property
    def calls(self) -> float:
        """One a token."""
        return self.max_new_tokens

    def _predicted(self, tokens: int) -> int:
        return min(self.max_new_tokens, super()._predicted(tokens))


@dataclass(frozen=True)
class Reference(OnItems):
    """nll: of a token of the reference after the evicted prompt, on average, in nats."""

    depends_on = (*OnItems.depends_on, *OnItems.prompt_depends_on)

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Predict."""
        model, tokenizer = self.load(device)
        references = [
            tokenizer(
                TASKS[self.task].reference(self.items[item]),
                add_special_tokens=False,
                truncation=True,
                max_length=self.max_new_tokens,
            )["input_ids"]
            for item in items
        ]
        for item, reference in zip(items, references, strict=True):
            if not reference:
                raise InputError(f"item {item} of {self.task} has an empty reference")
        cache, logits = self.read(model, tokenizer, config, items)
        judged = judge(model, cache, logits, references)
        return [{"nll": round(float(lost.mean()), 5)} for lost, _ in judged]


@dataclass(frozen=True)
class Agreement(OnItems):
    """agreement: percent of the tokens of the full cache's greedy text that would be written.

    That text is fed token by token, so that one that differs does not make others differ.
    """

    depends_on = (*OnItems.depends_on, *OnItems.prompt_depends_on)

    @property
    def calls(self) -> float:
        """One a token, twice."""
        return 2 * self.max_new_tokens

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Write under a full cache, then predict that."""
        model, tokenizer = self.load(device)
        written = self._texts(model, tokenizer, items)
        cache, logits = self.read(model, tokenizer, config, items)
        judged = judge(model, cache, logits, written)
        return [{"agreement": round(100 * float(hit.float().mean()), 3)} for _, hit in judged]

    def _texts(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[int]
    ) -> list[Tokens]:
        """The full cache's, each written once for all configurations."""
        known = _full_texts(self.path, self.dtype, model.device)
        asked = {item: (self.prompt(item, model, tokenizer), self.max_new_tokens) for item in items}
        new = [item for item in items if asked[item] not in known]
        if new:
            full = KeyformerConfig.preset("full")
            cache, logits = self.read(model, tokenizer, full, new)
            texts = write(model, cache, logits, self.max_new_tokens)
            known |= zip((asked[item] for item in new), texts, strict=True)
        return [known[asked[item]] for item in items]


SUMMARIES: dict[str, Any] = {
    "rouge": Rouge,
    "reference": Reference,
    "agreement": Agreement,
    "continued": Continued,
}
"""What of a document and its summary is measured."""


@dataclass(frozen=True)
class Answered(OnItems):
    """answered: 100 if what is written greedily contains the item's answer, else 0.

    answer_nll: of a token of that answer, had the model begun with it, on average, in nats. Items
    are those of :mod:`keyformer_evaluation.tasks.retrieval`.
    """

    depends_on = ("dtype", "bs", "prompt_kind", "max_new_tokens")

    @property
    def _characters(self) -> list[int]:
        return [sum(len(said["content"]) for said in item["messages"]) for item in self.items]

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Read, answer, look."""
        model, tokenizer = self.load(device)
        texts = {item: self._parts(self.items[item], model, tokenizer) for item in items}
        # Padding of a part would come between tokens, and ALiBi of some models counts it.
        alone = model.get_decoder().alibi == "columns" and max(map(len, texts.values())) > 1
        batches = [[item] for item in items] if alone else [list(items)]
        return [
            result
            for batch in batches
            for result in self._answers(
                batch, [texts[item] for item in batch], config, model, tokenizer
            )
        ]

    def _answers(
        self,
        items: Sequence[int],
        texts: Sequence[Sequence[Part]],
        config: KeyformerConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Result]:
        ids = [noise_id(self.items[item]) for item in items]
        answers = [self.items[item]["answer"] for item in items]
        cache, logits = read(model, texts, config, ids, self.max_new_tokens)
        right = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        judged = judge(model, copy.deepcopy(cache), logits, right)
        written = write(model, cache, logits, self.max_new_tokens)
        said = tokenizer.batch_decode(written, skip_special_tokens=True)
        return [
            {
                "answered": 100.0 * answered(text, answer),
                "answer_nll": round(float(lost.mean()), 5),
            }
            for text, answer, (lost, _) in zip(said, answers, judged, strict=True)
        ]

    def _parts(
        self, item: Item, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[Part]:
        def tokens(text: str) -> Tokens:
            return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        kind = prompt_kind(self.prompt_kind, tokenizer)
        parts: list[Part] = []
        for text in conversation(item["messages"], tokenizer, kind).split(CUT):
            read, _, questions = text.partition(AHEAD)
            ahead = tokens(questions)
            ids = tokens(read) if parts else encode(tokenizer, read)["input_ids"]
            parts.append(Part([*ids, *ahead], len(ahead)))
        room = trained_room(model, self.max_new_tokens)
        length = sum(len(part.ids) for part in parts)
        if room is not None and length > room:
            raise InputError(
                f"a text of {length} tokens is longer than the {room} that the positions of"
                f" {self.path} leave room for"
            )
        return parts


@dataclass(frozen=True)
class Watched(OnItems):
    """The base of what looks at attention while an item's reference is read after its prompt."""

    depends_on: ClassVar[tuple[str, ...]] = ("dtype", "task", *OnItems.prompt_depends_on)
    calls = 2

    def watch(
        self,
        item: int,
        config: KeyformerConfig,
        device: torch.device,
        tokens: int,
        look: Callable[[int, Tensor, Attended], None],
    ) -> None:
        """Feed a prompt and the first tokens of its reference, each in one call.

        Parameters
        ----------
        tokens
            How many of the reference.
        look
            Is told what those attend to: layer, their positions, and the attention.
        """
        model, tokenizer = self.load(device)
        prompt = self.prompt(item, model, tokenizer)
        reference = TASKS[self.task].reference(self.items[item])
        fed = encode(tokenizer, prompt, return_tensors="pt", return_token_type_ids=False)
        fed = fed.to(model.device)
        written = tokenizer(reference, add_special_tokens=False, return_tensors="pt")["input_ids"]
        written = written[:, :tokens].to(model.device)
        cache = KeyformerCache(model.config, config, [noise_id(self.items[item])])
        cache.max_new_tokens = self.max_new_tokens
        with torch.no_grad():
            model(**fed, past_key_values=cache, logits_to_keep=1)
            cache.observer = look
            model(input_ids=written, past_key_values=cache, logits_to_keep=1)


@dataclass(frozen=True)
class Attention(Watched):
    """How the tokens of the reference attend to the prompt and to each other.

    layer00, layer01, ...: percent of the weights below ``NEGLIGIBLE`` of their query's largest
    (Fig. 3a). mass005, ... mass100: percent of the attention on that percent of the tokens,
    those of largest weight, the mean over queries, heads and layers (Fig. 3b). Of a
    configuration that evicts nothing.
    """

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Attend."""
        found = (self._of(item, config, device) for item in items)
        return [{name: round(value, 4) for name, value in of.items()} for of in found]

    def _of(self, item: int, config: KeyformerConfig, device: torch.device) -> dict[str, float]:
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

        self.watch(item, config, device, self.max_new_tokens - 1, look)
        mass = torch.stack(masses).mean(dim=0)
        by_layer = {f"layer{i:02}": 100 * float(share) for i, share in enumerate(sparse)}
        return by_layer | {f"mass{s:03}": 100 * float(m) for s, m in zip(SHARES, mass, strict=True)}


@dataclass(frozen=True)
class Softmax(Watched):
    """What one head of the first item's first new token attends to (Fig. 4).

    position: of each token in the cache and of the new one, in order; weight: its share.
    The new token is the first of the reference, so it is the same under every configuration.
    """

    layer: int = 0
    head: int = 0

    depends_on = (*Watched.depends_on, "layer", "head")

    @property
    def contents(self) -> list[Item]:
        """The first item."""
        return self.items[:1]

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> list[Result]:
        """Attend."""
        seen: dict[int, Attended] = {}
        self.watch(0, config, device, 1, lambda layer, _, attended: seen.update({layer: attended}))
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
def _full_texts(path: str, dtype: str, device: torch.device) -> dict[tuple[str, int], Tokens]:
    """What a model has written so far under a full cache, by prompt and most tokens."""
    return {}


@lru_cache(maxsize=1)
def _load(
    path: str, dtype: str, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    logging.disable_progress_bar()  # there is one over the runs
    return load_model(path, dtype=dtype, device=device)
