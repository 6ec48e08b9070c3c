"""A conversation on one KeyformerCache: each turn is a prompt of its own on the same slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextStreamer,
)

from keyformer.cache import KeyformerCache
from keyformer.config import KeyformerConfig
from keyformer_evaluation.tasks.data import dialogue_opening, prompt_tokens
from keyformer_evaluation.tasks.generation import ends_text


class Chat:
    """Two speakers in a situation; the model speaks for the second.

    Nothing but the cache remembers the conversation, and the cache has a fixed number of slots,
    so that any number of turns fits into the same memory.

    Parameters
    ----------
    config
        The method; ``kv_budget`` sets the slots, else they are a share of the first prompt.
    narrative
        The situation.
    speakers
        The names of the user and of the model's part.
    start_token
        What the text begins with: see :func:`.data.prompt_tokens`.
    generate_options
        Passed to ``model.generate``; one sequence a turn, so no beams.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: KeyformerConfig,
        narrative: str,
        speakers: tuple[str, str],
        start_token: int | None = None,
        **generate_options: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = KeyformerCache(model.config, config)
        self.speakers, self.start_token = speakers, start_token
        self.generate_options = generate_options
        self._before = dialogue_opening(narrative, speakers)
        self._unfed = torch.zeros(1, 0, dtype=torch.int64, device=model.device)

    def reply(self, said: str, streamer: TextStreamer | None = None) -> str:
        """The model's next turn after the user's.

        Parameters
        ----------
        said
            One line.
        streamer
            Gets the tokens as they come.

        Raises
        ------
        InputError
            If the model's table of positions ends within this turn.
        """
        user, other = self.speakers
        prompt = self._encode(f"{self._before}{user}: {said}\n{other}:")
        seen = self.cache.get_seq_length()
        output = self.model.generate(
            prompt,
            # Longer than the prompt: by this, generate knows that the rest is in the cache.
            attention_mask=prompt.new_ones(1, seen + prompt.shape[1]),
            past_key_values=self.cache,
            stopping_criteria=[_EndOfLine(self.tokenizer)],
            streamer=streamer,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.generate_options,
        )
        new = output[:, prompt.shape[1] :]
        text = self.tokenizer.decode(new[0], skip_special_tokens=True)
        # The last token was not fed back. The end of a text never is: the talk goes on.
        self._unfed = new[:, -1:]
        if ends_text(self._unfed, self.model, self.generate_options).any():
            self._unfed = new[:, :0]
        self._before = "" if text.endswith("\n") else "\n"
        return text.strip()

    def _encode(self, text: str) -> Tensor:
        """What is still to be fed and ``text``, (1, tokens) int64."""
        if self.cache.get_seq_length() == 0:
            (ids,) = prompt_tokens(self.tokenizer, [text], self.start_token)
        else:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.cat([self._unfed, self._unfed.new_tensor([ids])], dim=-1)


class _EndOfLine(StoppingCriteria):
    """A turn is one line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = ["\n" in self.tokenizer.decode(last) for last in input_ids[:, -1:]]
        return torch.tensor(ended, device=input_ids.device)
