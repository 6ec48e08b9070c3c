"""generate in every mode: method full against stock transformers, eviction against itself."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from conftest import LargestTensor
from originals import ORIGINALS
from transformers import DynamicCache, set_seed

import keyformer.backends.torch
from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer
from keyformer.config import METHODS

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 4},
    "beam early": {"num_beams": 4, "early_stopping": True},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 4},
    "penalties": {"num_beams": 2, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("mode", MODES)
def test_full_equals_stock(stock, evicting, full, padded, mode: str) -> None:
    texts = []
    for model in (stock, evicting(full)):
        set_seed(0)
        texts.append(model.generate(**padded, max_new_tokens=12, **MODES[mode]))
    assert torch.equal(*texts)


@pytest.mark.parametrize(("length", "new"), [(1, 70), (2, 5), (130, 66)])
def test_full_equals_stock_at_any_length(stock, evicting, full, length: int, new: int) -> None:
    """Across several growths of the cache, and past its first block of slots."""
    prompt = torch.randint(1, 61, (2, length))
    expected = stock.generate(prompt, max_new_tokens=new, min_new_tokens=new)
    got = evicting(full).generate(prompt, max_new_tokens=new, min_new_tokens=new)
    assert torch.equal(expected, got)


def with_positions(padded) -> dict[str, torch.Tensor]:
    """The stock models' forward numbers padding too unless told not to; generate tells it."""
    positions = padded["attention_mask"].cumsum(-1) - 1
    return {**padded, "position_ids": positions.clamp(min=0)}


def test_full_logits_equal_stock(stock, evicting, full, padded) -> None:
    with torch.no_grad():
        expected = stock(**with_positions(padded)).logits
        for use_cache in (True, False):
            got = evicting(full)(**with_positions(padded), use_cache=use_cache).logits
            real = padded["attention_mask"].bool()
            assert torch.allclose(got[real], expected[real], atol=1e-4)


def test_attention_weights_equal_stock(stock, evicting, full, padded) -> None:
    options = {"max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True}
    expected = stock.generate(**padded, **options).attentions
    cache = KeyformerCache(stock.config, full)
    got = evicting(full).generate(**padded, past_key_values=cache, **options).attentions
    real = padded["attention_mask"].bool()
    for step in range(3):
        for layer in range(2):
            ours, theirs = (weights[step][layer].transpose(1, 2) for weights in (got, expected))
            assert ours.shape == theirs.shape
            asked = real if not step else torch.ones(3, 1, dtype=torch.bool)
            assert torch.allclose(ours[asked], theirs[asked], atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "method", "mode"),
    [
        ([*ORIGINALS][(number + more) % 3], method, mode)
        for number, method in enumerate(METHODS)
        for more, mode in enumerate(["greedy", "beam", "several"])
    ],
    scope="session",
)  # every pair of two of them
def test_slots_after_generate(evicting, padded, method: str, mode: str) -> None:
    """Non-empty slots are min(seen, k) in each layer and head, and no slots are spare."""
    config = KeyformerConfig.preset(method, kv_cache=50, seed=0)
    model = evicting()
    cache = KeyformerCache(model.config, config)
    options = {**MODES[mode], "max_new_tokens": 8, "min_new_tokens": 8}
    model.generate(**padded, past_key_values=cache, **options)
    prompts = padded["attention_mask"].sum(-1)
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    prompts = prompts.repeat_interleave(copies)
    assert cache.get_seq_length() == 24 + 7  # the last token is never fed back
    for layer in cache.layers:
        filled = (layer.positions >= 0).sum(-1)
        budget = torch.tensor([config.budget(int(n)) for n in prompts])
        assert torch.equal(filled, torch.minimum(budget, prompts + 7)[:, None].expand(-1, 4))
        newest = layer.positions.amax(-1)
        if config.recent_window(int(budget.min())) and not config.dilation:
            assert torch.equal(newest, (prompts + 6)[:, None].expand(-1, 4))
        if method != "full":
            assert layer.keys.shape == (len(prompts), 4, 12, 8)
    counted = sum(
        t.numel() * t.element_size()
        for layer in cache.layers
        for t in (layer.keys, layer.values, layer.positions, layer.scores)
    )
    assert cache.memory_bytes() == counted


@pytest.mark.parametrize("method", ["window", "streaming_llm", "h2o", "keyformer", "recall"])
def test_a_batch_gives_each_sequence_its_own_result(evicting, padded, method: str) -> None:
    config = KeyformerConfig.preset(method, kv_cache=50, noise="none")
    model = evicting(config)
    together = model.generate(**padded, max_new_tokens=8, min_new_tokens=8)
    for row, mask in enumerate(padded["attention_mask"]):
        alone = padded["input_ids"][row : row + 1, mask.bool()]
        text = model.generate(alone, max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(text[0, -8:], together[row, -8:])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tau_init": 1.0, "tau_end": 1.0},
        {"score": "shared"},
        {"key_set": "frozen"},
        {"positions": "new"},
        {"forgetting": 0.9, "normalize": "mean"},
        {"cache_dtype": "int8"},
    ],
)
def test_beams_keep_their_own_slots(evicting, padded, settings) -> None:
    """A beam's score is that of its text fed token by token through a cache of its own.

    In float64: what is computed alone and in a batch differs by the last digits, and where they
    decide how the float16 scale of an int8 vector is rounded, scores would differ by 3e-4.
    """
    config = KeyformerConfig(kv_cache=50, noise="none", generation_length=10, **settings)
    model = evicting(config).double()
    beams = model.generate(
        **padded,
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=7,
        min_new_tokens=7,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for beam, score in enumerate(beams.sequences_scores):
        row = beam // 2
        prompt = padded["input_ids"][row : row + 1, padded["attention_mask"][row].bool()]
        text = beams.sequences[beam, -7:]
        cache = KeyformerCache(model.config, config)
        total = 0.0
        inputs = prompt
        with torch.no_grad():
            for token in text:
                logits = model(inputs, past_key_values=cache).logits[0, -1]
                total += float(logits.log_softmax(-1)[token])
                inputs = token[None, None]
        assert total / 7 == pytest.approx(float(score), abs=1e-5)


def test_seed_repeats_and_changes(evicting, padded) -> None:
    def positions(seed: int | None) -> torch.Tensor:
        model = evicting()
        cache = KeyformerCache(model.config, KeyformerConfig(kv_cache=50, seed=seed))
        model.generate(**padded, past_key_values=cache, max_new_tokens=5, min_new_tokens=5)
        return torch.stack([layer.positions.sort().values for layer in cache.layers])

    assert torch.equal(positions(3), positions(3))
    assert not torch.equal(positions(3), positions(4))
    torch.manual_seed(0)
    first = positions(None)
    assert not torch.equal(first, positions(None))
    torch.manual_seed(0)
    assert torch.equal(first, positions(None))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("order", [[3, 1, 0, 2], [2]])
def test_noise_of_an_id_does_not_depend_on_the_batch(evicting, beams: int, order) -> None:
    """Each sequence's text and slots are those it has alone under its id."""
    config = KeyformerConfig(kv_cache=40, seed=5)
    prompts = torch.randint(1, 61, (4, 24), generator=torch.Generator().manual_seed(1))
    ids = [7, 2**32 + 1, 7_000_000_000, 0]
    model = evicting(config)

    def run(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cache = KeyformerCache(model.config, config, noise_ids=[ids[row] for row in rows])
        text = model.generate(
            prompts[rows],
            past_key_values=cache,
            num_beams=beams,
            max_new_tokens=6,
            min_new_tokens=6,
        )
        return text, cache.layers[0].positions.sort().values.unflatten(0, (len(rows), beams))

    texts, slots = run(order)
    for place, row in enumerate(order):
        alone, kept = run([row])
        assert torch.equal(texts[place], alone[0])
        assert torch.equal(slots[place], kept[0])
    prompts[1] = prompts[0]
    assert not torch.equal(*run([0, 1])[1])


def test_noise_ids_that_do_not_fit_are_refused(evicting) -> None:
    config = KeyformerConfig(kv_cache=40, seed=5)
    model = evicting(config)
    cache = KeyformerCache(model.config, config, noise_ids=[1, 2])
    with pytest.raises(InputError, match="noise_ids has 2 numbers, and the batch has 3 rows"):
        model.generate(torch.ones(3, 5, dtype=torch.int64), past_key_values=cache)


def test_temperature_follows_max_new_tokens(evicting, padded, monkeypatch) -> None:
    """T is generate's max_new_tokens, or what max_length leaves after the prompt."""
    taus = []
    scorer = keyformer.cache.Scorer
    monkeypatch.setattr(
        keyformer.cache, "Scorer", lambda *a: taus.append((a[2], a[3])) or scorer(*a)
    )
    model = evicting(KeyformerConfig(tau_init=1, tau_end=2))
    for options in ({"max_new_tokens": 8}, {"max_length": 32}):
        taus.clear()
        model.generate(**padded, min_new_tokens=8, **options)
        assert [tau for layer, tau in taus if layer == 0] == [1 + t / 8 for t in range(8)]


def test_a_step_of_full_takes_one_slot_also_where_scores_are_shared(stock, evicting) -> None:
    config = KeyformerConfig.preset("full", score="shared")
    model, text = evicting(config), torch.randint(1, 61, (2, 12))
    cache = KeyformerCache(model.config, config)
    with torch.no_grad():
        model(text[:, :8], past_key_values=cache)
        for token in text[:, 8:].split(1, dim=1):
            logits = model(token, past_key_values=cache).logits
        expected = stock(text).logits[:, -1:]
    assert torch.allclose(logits, expected, atol=1e-4)
    for layer in cache.layers:
        held = layer.positions.sort(dim=-1).values[..., -12:]
        assert torch.equal(held, torch.arange(12).expand_as(held))
        assert int((layer.positions >= 0).sum(dim=-1).max()) == 12


def test_second_prompt_on_the_same_cache(stock, evicting, full) -> None:
    """A chat turn: with full it equals one long text, with a budget the cache never grows."""
    turns = [torch.randint(1, 61, (1, n)) for n in (20, 9, 14)]

    def chat(model, cache, text=turns[0][:, :0]) -> torch.Tensor:
        for turn in turns:
            text = torch.cat([text, turn], dim=-1)
            text = model.generate(text, past_key_values=cache, max_new_tokens=6, min_new_tokens=6)
        return text

    expected = chat(stock, DynamicCache())
    model = evicting(full)
    assert torch.equal(chat(model, KeyformerCache(model.config, full)), expected)
    config = KeyformerConfig(kv_budget=12, recent=50, seed=0)
    cache = KeyformerCache(model.config, config)
    text = chat(model, cache)
    for layer in cache.layers:
        assert layer.keys.shape[2] == 12
        assert (layer.positions >= 0).all()
        recent = torch.arange(text.shape[1] - 7, text.shape[1] - 1)
        assert (layer.positions[..., None] == recent).any(2).all()
    size = cache.memory_bytes()
    chat(model, cache, text)
    assert cache.memory_bytes() == size
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory_bytes() == 0


def test_budget_beyond_the_prompt_fills_up(evicting) -> None:
    """k >= n: nothing leaves until the cache has grown to k, and there it stays."""
    model = evicting()
    cache = KeyformerCache(model.config, KeyformerConfig(kv_budget=90, seed=0))
    inputs = torch.randint(1, 61, (1, 80))
    for seen in range(80, 101):
        model(inputs, past_key_values=cache)
        filled = (cache.layers[0].positions >= 0).sum(-1)
        assert (filled == min(seen, 90)).all()
        inputs = torch.randint(1, 61, (1, 1))
    assert cache.layers[0].keys.shape[2] == 90


def test_no_tensor_grows_with_the_square_of_the_prompt(evicting, monkeypatch) -> None:
    monkeypatch.setitem(keyformer.backends.torch.CHUNK_ELEMENTS, "cpu", 2**16)
    model = evicting(KeyformerConfig(kv_cache=50, seed=0))
    n = 1200
    with torch.no_grad(), LargestTensor() as largest:
        model(torch.randint(1, 61, (1, n)), attention_mask=torch.ones(1, n), logits_to_keep=1)
    assert largest.elements <= n * 4 * 32  # the feed-forward layer's activations
    assert largest.elements < n * n / 8


def test_a_layers_prompt_is_freed_before_the_next(evicting, monkeypatch) -> None:
    """No layer's full keys and values are alive when the next one's are attended."""
    alive: list[weakref.ref] = []
    attend = KeyformerCache.attend

    def spy(self, query, key, value, *args, **kwargs):
        assert all(tensor() is None for tensor in alive)
        alive[:] = [weakref.ref(key._base), weakref.ref(key), weakref.ref(value)]
        return attend(self, query, key, value, *args, **kwargs)

    monkeypatch.setattr(KeyformerCache, "attend", spy)
    with torch.no_grad():
        evicting()(torch.randint(1, 61, (1, 50)))
    assert len(alive) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(stock, evicting, padded, dtype: torch.dtype) -> None:
    """Keys and values keep the model's dtype, scores are float32, logits stay close."""
    model = evicting(KeyformerConfig.preset("h2o", kv_cache=100)).to(dtype)
    cache = KeyformerCache(model.config, KeyformerConfig.preset("h2o", kv_cache=100))
    with torch.no_grad():
        logits = model(**padded, past_key_values=cache).logits
        expected = copy.deepcopy(stock).to(dtype)(**with_positions(padded)).logits
    assert cache.layers[0].keys.dtype == dtype
    assert cache.layers[0].scores.dtype == torch.float32
    real = padded["attention_mask"].bool()
    error = (logits - expected)[real].float().norm() / expected[real].float().norm()
    assert error < 0.03


def test_gradients_flow_without_a_cache(stock, evicting) -> None:
    inputs = torch.randint(1, 61, (2, 10))
    model = evicting()
    losses = []
    for trained in (stock, model):
        trained.zero_grad()
        loss = trained(inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert torch.allclose(*losses)
    pairs = zip(stock.parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-4) for a, b in pairs)
    stock.zero_grad()


def test_unusable_caches_are_refused(stock, evicting, padded) -> None:
    model = evicting()
    with pytest.raises(TypeError, match="DynamicCache"):
        model(**padded, past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="enable_keyformer"):
        stock(**padded, past_key_values=KeyformerCache(stock.config))
    with pytest.raises(InputError, match="static"):
        model.generate(**padded, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="cropped"):
        KeyformerCache(model.config).crop(-1)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(padded["input_ids"], attention_mask=torch.ones(3, 1, 24, 24))


def test_enable_keyformer_changes_the_method_in_place(stock, padded) -> None:
    model = copy.deepcopy(stock)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert enable_keyformer(model, KeyformerConfig.preset("window", kv_cache=20)) is model
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    evicted = model.generate(**padded, max_new_tokens=10)
    enable_keyformer(model, KeyformerConfig.preset("full"))
    expected = stock.generate(**padded, max_new_tokens=10)
    assert torch.equal(model.generate(**padded, max_new_tokens=10), expected)
    assert not torch.equal(evicted, expected)
