"""Models that transformers loaded: enable_keyformer, what generate does with it, and back."""

from __future__ import annotations

import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import LargestTensor, script
from families import FAMILIES, LAYERS, small_model
from originals import write_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    TextStreamer,
    pipeline,
    set_seed,
)

from keyformer import (
    InputError,
    KeyformerCache,
    KeyformerConfig,
    disable_keyformer,
    enable_keyformer,
    load_model,
)
from keyformer.backends.torch import CHUNK_ELEMENTS
from keyformer.served import MOVABLE


@pytest.fixture(scope="module", params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(name) -> PreTrainedModel:
    """transformers' own model, small and random."""
    return small_model(name)


MODES = {
    "greedy": {},
    "beam": {"num_beams": 4},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_full_equals_stock(stock, evicting, full, padded, mode: str) -> None:
    """Token for token, in a left-padded batch."""
    texts = []
    for model in (stock, evicting(full)):
        set_seed(0)
        texts.append(model.generate(**padded, max_new_tokens=10, **MODES[mode]))
    assert torch.equal(*texts)


def test_prompt_in_chunks_equals_stock(stock, evicting, padded) -> None:
    """Nothing leaves under full, so a prompt in chunks gives the same text."""
    model = evicting(KeyformerConfig.preset("full", prefill_chunk=7))
    expected = stock.generate(**padded, max_new_tokens=8)
    assert torch.equal(model.generate(**padded, max_new_tokens=8), expected)


class Kept:
    """An observer: what each layer's queries could attend to, by position in the text."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.by_layer: dict[int, list[torch.Tensor]] = {}

    def __call__(self, layer, query_positions, attended) -> None:
        """Add rows (heads, queries, 40) bool for one sequence."""
        known = attended.positions[0].repeat_interleave(
            self.heads // attended.positions.shape[1], dim=0
        )
        rows = torch.zeros(self.heads, query_positions.shape[1], 40, dtype=torch.bool)
        for row, position in enumerate(query_positions[0]):
            for head in range(self.heads):
                rows[head, row, known[head][known[head] >= 0]] = True
            rows[:, row, position + 1 :] = False
        self.by_layer.setdefault(layer, []).append(rows)


@torch.no_grad()
def test_eviction_equals_masked_attention(stock, evicting, name, monkeypatch) -> None:
    """Stock attention over the whole text, the evicted tokens masked, gives the same logits.

    All layers keep the same tokens, since the stock model makes one mask for all of them.
    """
    config = KeyformerConfig(kv_cache=40, recent=40, score="shared", seed=0)
    model = evicting()
    cache = KeyformerCache(model.config, config)
    cache.observer = kept = Kept(model.config.num_attention_heads)
    text = torch.randint(2, 61, (1, 40))
    got = [model(text[:, :25], past_key_values=cache).logits[0]]
    for end in range(26, 41):
        got.append(model(text[:, end - 1 : end], past_key_values=cache).logits[0])
        for layer in cache.layers:
            filled = (layer.positions >= 0).sum(-1)
            budget = 9 if name.startswith("gemma") and layer.window else 10
            assert layer.keys.shape[2] == budget and (filled == budget).all()
            recent = torch.arange(end - 4, end)
            assert (layer.positions[..., None] == recent).any(2).all()
    evicting_layer = LAYERS - 1  # in hybrid models the one without a window
    visible = torch.cat(kept.by_layer[evicting_layer], dim=1)
    assert (visible[:, -1].sum(-1) == 11).all()
    window = cache.layers[evicting_layer].window
    if window is not None:
        visible &= torch.ones(40, 40).tril().triu(1 - window).bool()
    assert not visible[:, -1, 29:].all()  # not just the last ones
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    make_mask = "create_causal_mask" if window is None else "create_sliding_window_causal_mask"
    module = sys.modules[type(stock).__module__]
    monkeypatch.setattr(module, make_mask, lambda *args, **kwargs: mask[None])
    expected = stock(text).logits[0]
    assert torch.allclose(torch.cat(got), expected, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3_text", "mistral window"])
def test_no_tensor_grows_with_the_square_of_the_prompt(name: str, monkeypatch) -> None:
    """Of a window no mask is built, and afterwards no more than it is held."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 2**14)
    n = 1500
    model = enable_keyformer(small_model(name, max_position_embeddings=n))
    cache = KeyformerCache(model.config, KeyformerConfig(kv_cache=50, seed=0))
    with LargestTensor() as largest:
        model(
            torch.randint(1, 61, (1, n)),
            attention_mask=torch.ones(1, n),
            past_key_values=cache,
            logits_to_keep=1,
        )
    assert largest.elements <= n * 4 * 32  # the feed-forward layer's activations
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == ([9, 750] if name == "gemma3_text" else [15, 15])


@torch.no_grad()
@pytest.mark.parametrize("name", sorted({*MOVABLE, "llama yarn", "opt"}))
def test_new_positions_equal_the_rebuilt_short_sequence(name: str) -> None:
    """With one layer and one head, stock attention over the tokens left gives the same logits."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_kv_heads": 1}
    stock = small_model(name, num_hidden_layers=1, layer_types=["full_attention"], **heads)
    model = enable_keyformer(copy.deepcopy(stock))
    config = KeyformerConfig(kv_budget=9, recent=40, positions="new", noise="none")
    cache = KeyformerCache(model.config, config)
    text = torch.randint(2, 61, (1, 40))
    read_at = list(range(20))
    model(text[:, :20], past_key_values=cache)
    evicted = 0
    for start, end in ((20, 21), (21, 22), (22, 27), (27, 28), (28, 40)):
        kept = cache.layers[0].positions[0, 0].sort().values.tolist()
        evicted += kept != list(range(start - 9, start))
        read_at += range(9, 9 + end - start)
        got = model(text[:, start:end], past_key_values=cache).logits[0]
        short = torch.tensor([kept + list(range(start, end))])
        positions = torch.arange(short.shape[1])[None]
        if name == "opt":  # a position that was learned stays the one the token was read at
            positions = torch.tensor(read_at)[short]
        expected = stock(text[0][short], position_ids=positions).logits[0, 9:]
        assert torch.allclose(got, expected, atol=1e-3)
    assert evicted > 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_windows_of_the_model_keep_their_positions(name: str) -> None:
    """New positions in the layers that evict change nothing in those with a window."""
    model = enable_keyformer(small_model(name))
    text = torch.randint(2, 61, (2, 40))
    layers = []
    for positions in ("original", "new"):
        config = KeyformerConfig(kv_cache=40, positions=positions, noise="none")
        cache = KeyformerCache(model.config, config)
        for part in text.split([25, 1, 1, 8, 5], dim=1):
            model(part, past_key_values=cache)
        layers.append(cache.layers)
    (window, evicting), (window_new, _) = layers
    assert window.keys.shape[2] == 9 and evicting.keys.shape[2] == 10
    assert torch.equal(window.positions.sort().values, torch.arange(31, 40).expand(2, 2, 9))
    order, order_new = window.positions.argsort(-1), window_new.positions.argsort(-1)
    keys = window.keys.take_along_dim(order[..., None], 2)
    assert torch.allclose(keys, window_new.keys.take_along_dim(order_new[..., None], 2), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "says"), [("mixtral", "mixtral"), ("llama dynamic", "dynamic"), ("phi3 long", "long")]
)
def test_new_positions_are_refused_where_a_rotation_cannot_be_undone(
    name: str, says: str, padded, monkeypatch
) -> None:
    rope = {
        "llama dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "phi3 long": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 128,
            "rope_theta": 1e4,
        },
    }
    shape = {**FAMILIES["phi3"], **({"rope_parameters": rope[name]} if name in rope else {})}
    monkeypatch.setitem(FAMILIES, name, shape)
    model = enable_keyformer(small_model(name), KeyformerConfig(positions="new"))
    with pytest.raises(InputError, match=says):
        model.generate(**padded, max_new_tokens=2)
    enable_keyformer(model, KeyformerConfig())
    assert model.generate(**padded, max_new_tokens=2).shape[1] > 24


def snapshot(model: PreTrainedModel) -> dict[str, object]:
    """Every module's class and attributes, and the configurations."""
    state = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items()}
        for key in ("_parameters", "_buffers", "_modules"):
            attributes[key] = {n: id(value) for n, value in vars(module)[key].items()}
        hooks = [len(value) for key, value in sorted(vars(module).items()) if "hooks" in key]
        state[name] = (type(module), attributes, hooks)
    state["config"] = dict(vars(model.config))
    state["generation"] = dict(vars(model.generation_config))
    return state


def test_disable_restores_the_model(stock, name, padded) -> None:
    model = copy.deepcopy(stock)
    model.config.use_cache = model.config.use_cache  # what is read is set: once, before
    before = snapshot(model)
    model.generate(**padded, max_new_tokens=2)
    enable_keyformer(model, KeyformerConfig(kv_cache=50))
    enable_keyformer(model, KeyformerConfig(kv_cache=30))
    evicted = model.generate(**padded, max_new_tokens=16)
    assert disable_keyformer(model) is model
    assert snapshot(model) == before
    expected = stock.generate(**padded, max_new_tokens=16)
    assert torch.equal(model.generate(**padded, max_new_tokens=16), expected)
    assert not torch.equal(evicted, expected)
    assert disable_keyformer(model) is model  # nothing to undo
    with pytest.raises(TypeError, match="enable_keyformer"):
        model(**padded, past_key_values=KeyformerCache(model.config))


def test_two_threads_with_a_cache_each(padded) -> None:
    model = enable_keyformer(small_model("llama"))

    def positions(seed: int) -> list[torch.Tensor]:
        cache = KeyformerCache(model.config, KeyformerConfig(kv_cache=40, seed=seed))
        model.generate(**padded, past_key_values=cache, max_new_tokens=16, min_new_tokens=16)
        return [layer.positions for layer in cache.layers]

    alone = [positions(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(positions, range(4)))
    for expected, got in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_layers_spread_over_devices(tmp_path) -> None:
    """accelerate's hooks, with a layer on disk, before enable_keyformer and after disable."""
    small_model("llama").save_pretrained(tmp_path / "llama")
    inputs = {"input_ids": torch.randint(2, 61, (2, 20)), "max_new_tokens": 8}
    config = KeyformerConfig.preset("h2o", kv_cache=50)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    expected = plain.generate(**inputs)
    evicted = enable_keyformer(plain, config).generate(**inputs)
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    spread = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    for device_map in ("auto", spread):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "llama", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(enable_keyformer(model, config).generate(**inputs), evicted)
        assert torch.equal(disable_keyformer(model).generate(**inputs), expected)


class Collected(TextStreamer):
    """A streamer that keeps the tokens it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streaming(padded) -> None:
    model = enable_keyformer(small_model("llama"), KeyformerConfig(kv_cache=50, seed=0))
    prompt = padded["input_ids"][1:2]
    streamer = Collected()
    text = model.generate(prompt, max_new_tokens=10, streamer=streamer)
    assert streamer.tokens == [*text[0].tolist(), -1]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with a small Qwen3 and a tokenizer."""
    path = tmp_path / "qwen3"
    small_model("qwen3", vocab_size=320, max_position_embeddings=1024).save_pretrained(path)
    write_tokenizer(path, "cerebras", 320)
    return path


def test_pipeline(checkpoint, caplog) -> None:
    config = KeyformerConfig(kv_cache=50, seed=0)
    model, tokenizer = load_model(checkpoint, config, dtype="float32", device="cpu")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "the key tokens"
    (result,) = generate(text, max_new_tokens=8, do_sample=False)
    tokens = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8)
    assert result["generated_text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert "not supported" not in caplog.text


def test_saved_as_the_stock_model(checkpoint, tmp_path) -> None:
    """A model that evicts is saved as one that transformers loads."""
    model, _ = load_model(checkpoint, dtype="float32", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3ForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again).__module__.startswith("transformers.")
    inputs = torch.randint(1, 320, (2, 9))
    with torch.no_grad():
        assert torch.allclose(model(inputs).logits, again(inputs).logits, atol=1e-4)


def test_task_script_takes_the_model(checkpoint, tmp_path) -> None:
    flags = ["--model_path", str(checkpoint), "--keyformer", "--kv_cache", "25", "--n_obs", "2"]
    flags += ["--max_new_tokens", "4", "--device", "cpu", "--bs", "2", "--beam", "2"]
    paths = ["--save_path", str(tmp_path / "texts"), "--score_path", str(tmp_path / "scores")]
    script("summarization", "summarize").main([*flags, *paths])
    scores = json.loads((tmp_path / "scores").read_text())
    assert scores["model"] == "qwen3" and scores["method"] == "keyformer"
    full = ["--attention", "full", *flags[:2], *flags[5:]]
    script("summarization", "summarize").main([*full, *paths])
    assert (
        json.loads((tmp_path / "scores").read_text())["kv_bytes_end"] > 3 * scores["kv_bytes_end"]
    )


@pytest.mark.parametrize("order", ["enabled first", "adapted first"])
def test_peft_adapter(padded, order: str) -> None:
    """A LoRA adapter counts, in the order that a user happens to choose."""
    stock = get_peft_model(small_model("llama"), lora := LoraConfig(init_lora_weights=False))
    stock.eval()
    full = KeyformerConfig.preset("full")
    expected = stock.generate(**padded, max_new_tokens=12)
    model = small_model("llama")
    if order == "enabled first":
        model = get_peft_model(enable_keyformer(model, full), lora)
    else:
        model = enable_keyformer(get_peft_model(model, lora), full)
    model.load_state_dict(stock.state_dict())
    model.eval()
    assert torch.equal(model.generate(**padded, max_new_tokens=12), expected)
    enable_keyformer(model, KeyformerConfig(kv_cache=30))
    output = model.generate(**padded, max_new_tokens=4, return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.shape[2] == int(24 * 0.3)
    disable_keyformer(model)
    assert torch.equal(model.generate(**padded, max_new_tokens=12), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**padded, max_new_tokens=12), expected)


REFUSED = {
    "mamba": "state-space",
    "t5": "encoder-decoder",
    "deepseek_v3": "latent",
    "qwen3_next": "linear_attention",
    "codegen": "attention interface",
    "gpt_oss": "s_aux",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_served(kind: str, padded) -> None:
    shape = {**FAMILIES["llama"], "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    shape |= {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4, "q_lora_rank": 8}
    shape |= {"state_size": 4, "num_local_experts": 2, "n_routed_experts": 2, "num_experts": 2}
    shape |= {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    config = AutoConfig.for_model(kind, **shape)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    before = snapshot(model)
    with pytest.raises(InputError, match=REFUSED[kind]) as error:
        enable_keyformer(model).generate(**padded, max_new_tokens=2)
    assert "\n" not in str(error.value)
    assert snapshot(disable_keyformer(model)) == before


def test_what_is_no_language_model_is_refused() -> None:
    model = small_model("llama")
    with pytest.raises(InputError, match="LlamaModel does not generate"):
        enable_keyformer(model.model)
    with pytest.raises(InputError, match="Linear is not a model"):
        enable_keyformer(model.lm_head)


def test_dropout_is_refused_not_ignored() -> None:
    model = enable_keyformer(small_model("llama", attention_dropout=0.1)).train()
    with pytest.raises(InputError, match="dropout"):
        model(torch.randint(2, 61, (1, 8)), past_key_values=KeyformerCache(model.config))


def test_gradients_flow_without_a_cache(padded) -> None:
    """Checkpointed too: a layer is then run again where no call is in progress."""
    inputs = padded["input_ids"][1:]
    losses, grads = [], []
    for kind in ("stock", "evicting", "checkpointed"):
        model = small_model("gemma2", attention_dropout=0.0).train()
        if kind != "stock":
            enable_keyformer(model)
        if kind == "checkpointed":
            model.gradient_checkpointing_enable()
        loss = model(inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in model.parameters()])
    for loss, other in zip(losses[1:], grads[1:], strict=True):
        assert torch.allclose(loss, losses[0])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(grads[0], other, strict=True))
