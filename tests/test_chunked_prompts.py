"""Prompts in chunks: the same whatever the batch, cut where they should be, in flat memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from conftest import small_stock
from torch.utils._python_dispatch import TorchDispatchMode

from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer
from keyformer.config import METHODS


def slots(cache: KeyformerCache) -> list[torch.Tensor]:
    """Positions and scores of every layer, in the text's order."""
    found = []
    for layer in cache.layers:
        order = layer.positions.argsort(dim=-1)
        found += [layer.positions.gather(-1, order), layer.scores.gather(-1, order)]
    return found


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_chunks_are_those_fed_by_hand(evicting, method: str) -> None:
    """Logits and slots of 29 tokens in chunks of 8 equal those of four forward calls."""
    model = evicting()
    text = torch.randint(1, 61, (2, 29))
    plain = KeyformerCache(model.config, KeyformerConfig.preset(method, kv_cache=40, seed=3))
    plain.expect(torch.ones(2, 29, dtype=torch.bool))
    by_hand = [model(part, past_key_values=plain).logits for part in text.split(8, dim=1)]
    config = KeyformerConfig.preset(method, kv_cache=40, seed=3, prefill_chunk=8)
    for wanted in (0, 1, 11, 99):
        cache = KeyformerCache(model.config, config)
        logits = model(text, past_key_values=cache, logits_to_keep=wanted).logits
        assert torch.allclose(logits, torch.cat(by_hand, dim=1)[:, -wanted:], atol=1e-5)
        for got, expected in zip(slots(cache), slots(plain), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
        assert cache.layers[0].positions.shape[-1] == (11 if method != "full" else 29 + 35)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [24, 100])
def test_a_chunk_as_long_as_the_prompt_is_the_papers_prompt_phase(evicting, padded, chunk) -> None:
    model = evicting()
    logits, kept = [], []
    for size in (None, chunk):
        cache = KeyformerCache(model.config, KeyformerConfig(seed=0, prefill_chunk=size))
        logits.append(model(**padded, past_key_values=cache).logits)
        kept.append(slots(cache))
    assert torch.equal(*logits)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}])
@pytest.mark.parametrize("chunk", [1, 5])
def test_full_is_the_stock_model_in_any_chunks(stock, evicting, padded, chunk, options) -> None:
    model = evicting(KeyformerConfig.preset("full", prefill_chunk=chunk))
    expected = stock.generate(**padded, max_new_tokens=12, **options)
    assert torch.equal(model.generate(**padded, max_new_tokens=12, **options), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "new"])
@torch.no_grad()
def test_a_batch_cuts_each_sequence_where_it_is_cut_alone(evicting, padded, side, positions):
    config = KeyformerConfig(kv_cache=50, noise="none", prefill_chunk=5, positions=positions)
    model = evicting()
    if side == "right":
        padded = {name: tensor.flip(1) for name, tensor in padded.items()}
    together = KeyformerCache(model.config, config)
    logits = model(**padded, past_key_values=together).logits
    one = torch.full((3, 1), 7)
    after = model(one, past_key_values=together).logits
    for row, mask in enumerate(padded["attention_mask"].bool()):
        alone = KeyformerCache(model.config, config)
        got = model(padded["input_ids"][row : row + 1, mask], past_key_values=alone).logits[0]
        assert torch.allclose(got, logits[row, mask], atol=1e-4)
        assert torch.allclose(
            model(one[:1], past_key_values=alone).logits[0], after[row], atol=1e-4
        )


@torch.no_grad()
def test_with_chunks_of_one_a_token_sees_only_key_and_recent_tokens(evicting) -> None:
    """As many slots as the budget has, and itself; afterwards the prompt counts as step 0."""
    model = evicting()
    cache = KeyformerCache(model.config, KeyformerConfig(kv_cache=50, seed=0, prefill_chunk=1))
    seen = []
    cache.observer = lambda layer, asked_at, attended: seen.append(
        (layer, int(asked_at), int((attended.positions[0, 0] >= 0).sum()))
    )
    model(torch.randint(1, 61, (1, 20)), past_key_values=cache)
    assert seen == [(layer, i, min(i, 10) + 1) for i in range(20) for layer in range(2)]
    assert cache.text.step == 0
    model(torch.randint(1, 61, (1, 1)), past_key_values=cache)
    assert cache.text.step == 1
    model(torch.randint(1, 61, (1, 5)), past_key_values=cache)  # a second prompt, in chunks too
    assert seen[-1] == (1, 25, 11)
    assert cache.text.step == 0
    assert cache.text.prompt_end == cache.get_seq_length() == 26


class Live(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if not size or at in self.known:
            return
        self.known[at] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, at)

    def forget(self, at: int) -> None:
        self.now -= self.known.pop(at, 0)


@torch.no_grad()
def test_memory_does_not_grow_with_the_prompt(evicting) -> None:
    """Beside its tokens' order and mask, eight times the prompt takes no byte more."""
    peaks = []
    for n in (128, 1024):
        model = evicting(KeyformerConfig(kv_budget=16, seed=0, prefill_chunk=32))
        text = torch.randint(1, 61, (1, n))
        cache = KeyformerCache(model.config, model.base_model.keyformer_config)
        with Live() as live:
            model(text, past_key_values=cache, logits_to_keep=1)
        peaks.append(live.most - 10 * n)
        assert cache.get_seq_length() == n
        assert cache.layers[0].keys.shape[2] == 16
    assert peaks[1] <= peaks[0]


def test_new_positions_need_a_table_for_cache_and_chunk_alone(arch: str) -> None:
    """A prompt of three times the table, where only the cache and a chunk have places."""
    stock = small_stock(arch, **{"max_seq_len" if arch == "mpt" else "n_positions": 24})
    text = torch.randint(1, 61, (1, 72))
    settings = {"kv_budget": 16, "positions": "new", "noise": "none"}
    model = enable_keyformer(stock, KeyformerConfig(**settings, prefill_chunk=8))
    out = model.generate(text, max_new_tokens=30, min_new_tokens=30)
    assert out.shape == (1, 102)
    if arch != "mpt":
        for chunk in (None, 9):
            enable_keyformer(model, KeyformerConfig(**settings, prefill_chunk=chunk))
            needed = chunk + 16 if chunk else 72
            with pytest.raises(InputError, match=f"would take {needed} positions and the model"):
                model.generate(text, max_new_tokens=30)


def test_places_are_counted_chunk_by_chunk(evicting) -> None:
    """The largest place that any chunk takes, also where the last one is short."""
    model = evicting()
    for n in (*range(1, 10), 14, 21, 28, 29):
        for chunk in (1, 4, 7, 40):
            config = KeyformerConfig(
                kv_budget=9, positions="new", noise="none", prefill_chunk=chunk
            )
            cache = KeyformerCache(model.config, config)
            real = torch.ones(1, n, dtype=torch.bool)
            expected = cache.places_needed(real)
            cache.expect(real)
            taken = []
            for part in real.split(chunk, dim=1):
                taken.append(int(cache.next_places(part).max()) + 1)
                keys = torch.zeros(1, 4, part.shape[1], 8)
                for layer in range(2):
                    cache.attend(keys, keys, keys, layer, part, scale=1.0)
            assert max(taken) == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_of_all_layers_are_refused(evicting, name: str) -> None:
    model = evicting(KeyformerConfig(prefill_chunk=4))
    with pytest.raises(InputError, match="neither attentions nor hidden states"):
        model(torch.randint(1, 61, (1, 9)), **{name: True})
    model(torch.randint(1, 61, (1, 4)), **{name: True})


@torch.no_grad()
def test_tuples_and_losses(evicting) -> None:
    model = evicting(KeyformerConfig(prefill_chunk=4, seed=0))
    text = torch.randint(1, 61, (2, 9))
    output = model(text, labels=text)
    logits = output.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, text[:, 1:].flatten())
    assert torch.allclose(output.loss, expected)
    assert torch.equal(model(text, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("value", [0, -3, 2.5, "4", True])
def test_bad_chunks(value) -> None:
    with pytest.raises(InputError, match="prefill_chunk must be a whole number >= 1 or None"):
        KeyformerConfig(prefill_chunk=value)
