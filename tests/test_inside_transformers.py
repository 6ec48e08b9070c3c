"""What users of transformers do with a model that evicts: stock's value, or one line that says why.

Each test is named for the fault that it keeps away; generated cases are in test_stock_cases.py,
generate's outputs and training in test_transformers_own.py, the kernels' in test_kernels.py.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from conftest import Forked, kept, small
from originals import ORIGINALS
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MptForCausalLM,
    MptModel,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

import keyformer.replay
from keyformer import InputError, KeyformerCache, KeyformerConfig, disable_keyformer
from keyformer import enable_keyformer as enable
from keyformer.compat import LayerConfig

FULL = KeyformerConfig.preset("full")
HALF = KeyformerConfig.preset("h2o", kv_cache=50)
WINDOWED = ("mistral window", "gemma3_text")
NAMES = ("llama", "gpt_neox", "opt", "falcon", "bloom", *WINDOWED, *ORIGINALS)
PLACED = [name for name in NAMES if name not in ("mpt", "bloom")]
"""Models whose forward takes position_ids; ALiBi is by column or by the mask alone."""


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def stock(name) -> PreTrainedModel:
    return kept(name)


@pytest.fixture
def text() -> Tensor:
    """Two sequences of 24 tokens."""
    return torch.randint(2, 61, (2, 24), generator=torch.Generator().manual_seed(3))


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever they are called."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def one_line(error: pytest.ExceptionInfo) -> None:
    assert len(str(error.value).splitlines()) == 1


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a1_attention_switched_after_enabling(text, implementation: str) -> None:
    """Still evicts, and is still causal."""
    stock = small("llama")
    model = enable(copy.deepcopy(stock), HALF)
    model.set_attn_implementation(implementation)
    stock.set_attn_implementation(implementation)
    got = model(text)
    assert torch.allclose(got.logits, stock(text).logits, atol=1e-4)
    assert got.past_key_values.layers[0].keys.shape[2] == 12
    without = model(text, use_cache=False).logits
    assert torch.allclose(without, stock(text).logits, atol=1e-4)
    assert model.config._attn_implementation == implementation
    assert disable_keyformer(model).config._attn_implementation == implementation


@torch.no_grad()
def test_a1_a_layer_that_no_longer_reaches_the_cache_is_refused(text) -> None:
    model = enable(small("llama"), HALF)
    attention = model.model.layers[1].self_attn
    assert isinstance(attention.config, LayerConfig)
    attention.config = model.config
    with pytest.raises((InputError, TypeError)) as error:
        model(text)
    one_line(error)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("at", [0, 1])
def test_interrupted_forwards_leave_no_cache_to_go_on_with(name, text, chunk, at: int) -> None:
    """Layers would hold different texts; once reset it is as a new one."""
    model = enable(small(name), KeyformerConfig.preset("full", prefill_chunk=chunk))
    cache = KeyformerCache(model.config, model.get_decoder().keyformer_config)
    expected = model(text[:, :12], past_key_values=cache).logits

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    cache.layers[at].attend = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(text[:, 12:], past_key_values=cache)
    del cache.layers[at].attend
    with pytest.raises(InputError, match="reset the cache") as error:
        model(text[:, 12:], past_key_values=cache)
    one_line(error)
    cache.reset()
    assert torch.equal(model(text[:, :12], past_key_values=cache).logits, expected)


def chat(model: PreTrainedModel, cache: Any, text: Tensor) -> Tensor:
    """A batched chat: row 1's reply ended early, and turn 2 masks what followed it."""
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 10:16] = 0
    model(text[:, :12], past_key_values=cache)
    for end in range(13, 17):
        mask_then = torch.ones(2, end, dtype=torch.int64)
        model(text[:, end - 1 : end], past_key_values=cache, attention_mask=mask_then)
    return model(text[:, 16:], past_key_values=cache, attention_mask=mask).logits


@torch.no_grad()
def test_a2_masks_over_the_past(stock, name, text) -> None:
    expected = chat(stock, DynamicCache(config=stock.config), text)
    model = enable(copy.deepcopy(stock), FULL)
    got = chat(model, KeyformerCache(model.config, FULL), text)
    assert torch.allclose(got, expected, atol=2e-4)


@torch.no_grad()
def test_a2_hidden_tokens_are_the_first_to_leave(text) -> None:
    """Under eviction: hidden at once, and gone before any token that is seen."""
    model = enable(small("llama"), FULL)
    cache = KeyformerCache(model.config, KeyformerConfig.preset("h2o", kv_budget=20))
    model(text[:, :16], past_key_values=cache)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 3:9] = 0
    model(text[:, 16:20], past_key_values=cache, attention_mask=mask)
    for layer in cache.layers:
        seen = layer.positions[1, 0][layer.positions[1, 0] >= 0]
        assert not set(range(3, 9)) & set(seen.tolist())
        assert (layer.positions[0] >= 0).all()
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    model(text[:, 20:], past_key_values=cache, attention_mask=mask)
    for layer in cache.layers:
        seen = layer.positions[1][layer.positions[1] >= 0].view(2, -1)
        assert (seen.sort().values == torch.tensor([0, 1, 2, *range(9, 24)])).all()
        assert (layer.positions[0] >= 0).all()  # row 0 hides nothing and keeps 20


@torch.no_grad()
def test_a2_shown_again(text) -> None:
    """What one mask hides and the next shows is back, under method full."""
    stock = small("llama")
    model = enable(copy.deepcopy(stock), FULL)
    logits = []
    for one, cache in ((stock, DynamicCache(config=stock.config)), (model, None)):
        mask = torch.ones(2, 24, dtype=torch.int64)
        cache = cache or KeyformerCache(model.config, FULL)
        one(text[:, :12], past_key_values=cache)
        hiding = mask.clone()
        hiding[:, 2:9] = 0
        one(text[:, 12:16], past_key_values=cache, attention_mask=hiding[:, :16])
        logits.append(one(text[:, 16:], past_key_values=cache, attention_mask=mask).logits)
    assert torch.allclose(*logits, atol=1e-4)


@torch.no_grad()
def test_a2_padding_is_never_shown(text) -> None:
    model = enable(small("llama"), FULL)
    cache = KeyformerCache(model.config, FULL)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :4] = 0
    model(text[:, :20], past_key_values=cache, attention_mask=mask[:, :20])
    with pytest.raises(InputError, match="padding") as error:
        model(text[:, 20:], past_key_values=cache, attention_mask=torch.ones_like(mask))
    one_line(error)
    with pytest.warns(UserWarning, match="attention_mask is not given"):
        got = model(text[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    again = model(text[:, 20:], past_key_values=cache, attention_mask=mask).logits
    assert torch.allclose(got, again)


@pytest.mark.parametrize("shape", [(2, 5), (1, 24), (2, 30)])
def test_a2_masks_of_another_shape_are_refused(text, shape) -> None:
    model = enable(small("llama"), FULL)
    with pytest.raises(InputError, match=r"attention_mask must have shape \(2, 24\)") as error:
        model(text, attention_mask=torch.ones(shape))
    one_line(error)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a3_prefill_chunk_size(name, stock, text, padded: bool) -> None:
    """transformers' own chunks keep as much of the whole prompt as this project's do."""
    mask = torch.ones_like(text)
    if padded:
        mask[0, :9] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    kept = []
    for chunks, config in (
        ({"prefill_chunk_size": 8}, HALF),
        ({}, KeyformerConfig.preset("h2o", kv_cache=50, prefill_chunk=8)),
    ):
        model = enable(copy.deepcopy(stock), config)
        output = model.generate(text, attention_mask=mask, **options, **chunks)
        kept.append((output.sequences, output.past_key_values.text.budget.tolist()))
    budgets = [15 // 2, 12] if padded else [12, 12]
    limit = 15 if name == "mistral window" else 24
    assert kept[0][1] == kept[1][1] == [min(k, limit) for k in budgets]
    if not padded:
        assert torch.equal(kept[0][0], kept[1][0])


@torch.no_grad()
@pytest.mark.parametrize("name", PLACED)
def test_a4_position_ids(stock, name, text) -> None:
    """Packed sequences do not see each other, and positions need not count up by one."""
    model = enable(copy.deepcopy(stock), FULL)
    packed = torch.tensor([[*range(10), *range(14)]]).expand(2, -1)
    spread = (torch.arange(24) * 3 + 2)[None].expand(2, -1)
    for options in (
        {"position_ids": packed, "use_cache": False},
        {"position_ids": packed, "use_cache": True},
        {"position_ids": spread},
    ):
        assert torch.allclose(
            model(text, **options).logits, stock(text, **options).logits, atol=2e-4
        )


@torch.no_grad()
def test_a4_places_that_cannot_be_given_are_refused(text) -> None:
    model = enable(small("llama"), KeyformerConfig(positions="new"))
    with pytest.raises(InputError, match="position_ids") as error:
        model(text, position_ids=torch.tensor([[*range(10), *range(14)]]).expand(2, -1))
    one_line(error)


@pytest.mark.parametrize("config", [FULL, HALF], ids=["full", "h2o"])
def test_a5_gradient_checkpointing(name, text, config) -> None:
    """As a trainer calls it: with whatever cache the configuration asks for."""
    gradients = []
    for evicts in (False, True):
        model = small(name, attention_dropout=0.0, hidden_dropout=0.0, dropout=0.0)
        model = enable(model, config) if evicts else model
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(text, labels=text).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("gpt2", {"attn_pdrop": 0.9}),
        ("gpt2", {"resid_pdrop": 0.9, "attn_pdrop": 0.0}),
        ("llama", {"attention_dropout": 0.9}),
        ("bloom", {"attention_dropout": 0.9}),
        ("falcon alibi", {"attention_dropout": 0.9}),
    ],
)
def test_a6_dropout_is_applied_in_training(name: str, rates, text) -> None:
    """The same as stock's, drawn with the same seed; with a cache of this kind it is refused."""
    stock = small(name, **rates)
    model = enable(copy.deepcopy(stock), FULL)
    logits = []
    for one in (stock, model):
        one.train()
        torch.manual_seed(5)
        logits.append(one(text).logits)
    assert torch.allclose(*logits, atol=1e-3)
    assert not torch.allclose(logits[0], stock.eval()(text).logits, atol=1e-2)
    cache = KeyformerCache(model.config, FULL)
    if "resid_pdrop" in rates:
        torch.manual_seed(5)
        dropped = model(text, past_key_values=cache).logits
        assert not torch.allclose(dropped, model.eval()(text).logits, atol=1e-2)
    else:
        with pytest.raises(InputError, match="dropout") as error:
            model(text, past_key_values=cache)
        one_line(error)


@torch.no_grad()
def test_dropout_counts_by_the_modules_own_mode(name, text) -> None:
    """Switched on alone, as for Monte Carlo dropout, and off alone in a model that trains."""
    stock = small(name)
    for module in stock.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model = enable(copy.deepcopy(stock), FULL)
    for drops in (True, False):
        logits = []
        for one in (model, stock):
            for module in one.modules():
                module.training = isinstance(module, nn.Dropout) == drops
            cache = KeyformerCache(model.config, FULL) if one is model else None
            torch.manual_seed(5)
            # Of GPT-2's attention it is the layer's mode that counts.
            if one is model and name in (("gptj", "bloom") if drops else ("cerebras",)):
                with pytest.raises(InputError, match="attention dropout") as error:
                    one(text, past_key_values=cache)
                one_line(error)
                break
            logits.append(one(text, past_key_values=cache).logits)
        else:
            assert torch.allclose(*logits, atol=2e-4)


@torch.no_grad()
def test_a7_prompt_lookup_under_full(stock, name, text) -> None:
    """But for layers with a window, which have let tokens go: there it is refused at once."""
    options = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3, "do_sample": False}
    prompt = torch.cat([text[:1, :8]] * 3, dim=1)
    model = enable(copy.deepcopy(stock), FULL)
    if name in WINDOWED:
        with pytest.raises(InputError, match="takes tokens back") as error:
            model.generate(prompt, **options)
        one_line(error)
    else:
        assert torch.equal(model.generate(prompt, **options), stock.generate(prompt, **options))


@torch.no_grad()
def test_a7_cropped_caches_go_on(text) -> None:
    """Tokens that were taken back leave no trace; what has been evicted cannot come back."""
    model = enable(small("llama"), FULL)
    cache, expected = (KeyformerCache(model.config, FULL) for _ in range(2))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    for one, end in ((cache, 18), (expected, 14)):
        model(text[:, :end], past_key_values=one, attention_mask=mask[:, :end])
    cache.crop(-4)
    assert cache.get_seq_length() == 14
    logits = [
        model(text[:, 14:], past_key_values=one, attention_mask=mask).logits
        for one in (cache, expected)
    ]
    assert torch.allclose(*logits, atol=1e-5)
    evicted = KeyformerCache(model.config, HALF)
    model(text, past_key_values=evicted)
    with pytest.raises(InputError, match="evicted"):
        evicted.crop(-1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a8_weights_of_an_evicting_method_are_by_column(text, dtype) -> None:
    """Zero where a token was evicted, and the rest adds up to one."""
    model = enable(small("llama").to(dtype), HALF)
    output = model.generate(
        text, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True
    )
    for step, layers in enumerate(output.attentions):
        for weights in layers:
            assert weights.dtype == dtype
            assert weights.shape == ((2, 4, 24, 24) if not step else (2, 4, 1, 24 + step))
            assert torch.allclose(
                weights.float().sum(-1), torch.ones(()), atol=1e-5 if dtype.itemsize == 4 else 0.02
            )
            assert not step or (weights > 0).sum(-1).max() <= 13


def through(model: PreTrainedModel, cache: Any, text: Tensor) -> list[Tensor]:
    """Logits of a prompt, a step, several tokens and a step, on one cache."""
    parts = text.split([16, 1, 6, 1], dim=1)
    return [model(part, past_key_values=cache).logits for part in parts]


@pytest.mark.parametrize("config", [FULL, HALF], ids=["full", "h2o"])
@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj", "q_proj v_proj", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gptj", "gemma3_text"])
def test_gradients_of_some_weights_through_a_cache(name, stock, text, config, trained) -> None:
    """As of an adapter on them: nothing that they need has been written over."""
    gradients = []
    for evicts in (False, True):
        model = copy.deepcopy(stock)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in key for part in trained.split()))
        cache = DynamicCache(config=model.config)
        if evicts:
            cache = KeyformerCache(enable(model, config).config, config)
        torch.cat(through(model, cache, text), dim=1).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert gradients[0]
    for one, other in zip(*gradients, strict=True):
        assert one.isfinite().all() and other.isfinite().all()
        assert config != FULL or torch.allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [FULL, HALF], ids=["full", "h2o"])
def test_a_cache_leaves_inference_mode(name, stock, text, config) -> None:
    """And goes on, with gradients or without, and back into it."""
    model = enable(copy.deepcopy(stock), config)
    expected = through(model, KeyformerCache(model.config, config), text)
    for mode in (torch.no_grad, torch.enable_grad):
        cache, logits = KeyformerCache(model.config, config), []
        for number, part in enumerate(text.split([16, 1, 6, 1], dim=1)):
            with mode() if number % 2 else torch.inference_mode():
                logits.append(model(part, past_key_values=cache).logits)
        for one, other in zip(logits, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    with torch.inference_mode():
        model(text, past_key_values=(cache := KeyformerCache(model.config, config)))
    cache.reorder_cache(torch.tensor([1, 0]))
    if config == FULL and name not in WINDOWED:
        cache.crop(-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gptj", "opt"])
def test_prompts_that_peft_trains(name, stock, text) -> None:
    """Virtual tokens count; virtual keys and values are refused, in whatever order."""
    wrap = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    torch.manual_seed(0)
    prompted = get_peft_model(copy.deepcopy(stock), PromptTuningConfig(**wrap)).eval()
    expected = prompted.generate(input_ids=text, max_new_tokens=6)
    enable(prompted, FULL)
    assert torch.equal(prompted.generate(input_ids=text, max_new_tokens=6), expected)
    prefixed = get_peft_model(copy.deepcopy(stock), PrefixTuningConfig(**wrap)).eval()
    enabled_first = get_peft_model(enable(copy.deepcopy(stock), FULL), PrefixTuningConfig(**wrap))
    for refused in (
        lambda: enable(prefixed, FULL),
        lambda: enabled_first.eval().generate(input_ids=text, max_new_tokens=6),
    ):
        with pytest.raises(InputError, match="PREFIX_TUNING of PEFT") as error:
            refused()
        one_line(error)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gptj", "cerebras"])
def test_a9_token_type_ids(name: str, text) -> None:
    stock = small(name)
    kinds = {"token_type_ids": text % 5, "max_new_tokens": 6}
    got = enable(copy.deepcopy(stock), FULL).generate(text, **kinds)
    assert torch.equal(got, stock.generate(text, **kinds))
    assert not torch.equal(got, stock.generate(text, max_new_tokens=6))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "how"), zip(NAMES, itertools.cycle(["pickle", "torch.save", "deepcopy"]))
)
def test_a10_pickled(name, text, how: str) -> None:
    """As long as stock can be: once asked for hidden states it holds hooks that cannot."""
    stock = small(name)
    model = enable(copy.deepcopy(stock), HALF)
    expected = model.generate(text, max_new_tokens=8)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        again = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert torch.equal(again.generate(text, max_new_tokens=8), expected)
    assert type(again) is type(model)
    assert torch.equal(
        disable_keyformer(again).generate(text, max_new_tokens=8),
        stock.generate(text, max_new_tokens=8),
    )


def test_loaded_where_nothing_is_imported(tmp_path, text) -> None:
    """Where nobody but the pickle imports this project."""
    model = enable(small("llama"), HALF)
    torch.save((model, text, model.generate(text, max_new_tokens=4)), tmp_path / "model.pt")
    (tmp_path / "load.py").write_text(FORGETS)
    code, _, errors = Forked(
        [str(tmp_path / "load.py"), str(tmp_path / "model.pt")], tmp_path
    ).wait()
    assert code == 0, errors


FORGETS = """
import sys, torch
for name in list(sys.modules):
    if "keyformer" in name.partition(".")[0]:
        del sys.modules[name]
model, text, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model.generate(text, max_new_tokens=4), expected)
"""
"""A script that does not have this project's modules yet, but transformers'."""


def test_a11_saved_under_the_stock_models_name(stock, tmp_path) -> None:
    model = enable(copy.deepcopy(stock), HALF)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [type(stock).__name__]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(stock)
    assert model.get_decoder().keyformer_config == HALF  # and goes on as it was
    assert type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


class Changed(LlamaAttention):
    """An attention that has all the marks of one that is served, and attends otherwise."""

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        **kw,
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, kw)
        return self.o_proj(output.flatten(2)), weights


class TwoHeadsDifference(Changed):
    def attend(self, query, key, value, mask, kw):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        halves = value.chunk(2, dim=1)
        return function(
            self, query, key, torch.cat([halves[1], halves[0]], dim=1), mask, scaling=1.0, **kw
        )


class ThirdTensor(Changed):
    def attend(self, query, key, value, mask, kw):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return function(self, query, key, value, mask, scaling=1.0, gate=query.sigmoid(), **kw)


class OwnProduct(Changed):
    def attend(self, query, key, value, mask, kw):
        return torch.softmax(query @ query.transpose(2, 3), -1) @ query, None


@pytest.mark.parametrize("attention", [TwoHeadsDifference, ThirdTensor, OwnProduct])
def test_a12_models_with_another_attention_are_refused(attention, text) -> None:
    """When they are enabled, with the reason, and left as they were."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for number, layer in enumerate(model.model.layers):
        layer.self_attn = attention(config, number)
    config.model_type = "unheard of"
    with pytest.raises(InputError, match="not supported") as error:
        enable(model, FULL)
    one_line(error)
    assert type(model) is LlamaForCausalLM
    assert all(layer.self_attn.config is config for layer in model.model.layers)


@pytest.mark.parametrize(
    "kind",
    ["diffllama", "doge", "cohere", "olmo2", "stablelm", "phi", "starcoder2", "granite", "mixtral"],
)
def test_a12_models_of_transformers_that_are_none_of_these(kind: str) -> None:
    """Either method full gives the stock model's logits, or one line says why not."""
    config = AutoConfig.for_model(
        kind, vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(2, 61, (2, 9))
    try:
        model = enable(copy.deepcopy(stock), FULL)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, stock(tokens).logits, atol=1e-4)


SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64,
}  # fmt: skip
BOTH_WAYS = (
    *("bert", "bert-generation", "roberta", "roberta-prelayernorm", "xlm-roberta"),
    *("xlm-roberta-xl", "camembert", "electra", "ernie", "data2vec-text", "roc_bert"),
)


def small_of(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model of a type that nobody has tested, its logits well apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("doge", {"keep_window_size": 4}, "its own attention mask"),
        ("doge", {}, "its own attention mask"),
        ("moshi", {"ffn_dim": 64}, "other logits than transformers' own"),
        *((kind, {}, "attend to later ones, unless is_decoder") for kind in BOTH_WAYS),
    ],
)
def test_models_that_compute_otherwise_are_refused(kind: str, changes, reason: str) -> None:
    """Masks that are more than masks, tokens that see later ones, windows that are none."""
    model = small_of(kind, **changes)
    before, stock = dict(vars(model.config)), type(model)
    with pytest.raises(InputError, match=reason) as error:
        enable(model, FULL)
    one_line(error)
    assert type(model) is stock and vars(model.config) == before


@torch.no_grad()
@pytest.mark.parametrize("kind", ["biogpt", "starcoder2", *BOTH_WAYS])
def test_untested_models_equal_stock(text, kind: str) -> None:
    """Left padding without position_ids, and then a masked past, beyond the window if there is."""
    changes = {"is_decoder": True} if kind in BOTH_WAYS else {}
    changes |= {"sliding_window": 9} if kind == "starcoder2" else {}
    stock = small_of(kind, **changes)
    model = enable(copy.deepcopy(stock), FULL)
    assert vars(model.config) == vars(stock.config)
    mask = torch.ones_like(text)
    mask[0, :6] = 0
    expected = stock(text, attention_mask=mask).logits
    got = model(text, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=2e-4)
    expected = chat(stock, DynamicCache(config=stock.config), text)
    got = chat(model, KeyformerCache(model.config, FULL), text)
    assert torch.allclose(got, expected, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bloom", "cerebras"])
def test_windows_that_a_model_does_not_know_are_none(name: str, text) -> None:
    """What is left over in a config.json from another model changes nothing."""
    stock = small(name)
    stock.config.sliding_window = 5
    model = enable(copy.deepcopy(stock), FULL)
    assert torch.allclose(model(text).logits, stock(text).logits, atol=2e-4)


def called_within(layer: nn.Module, model: PreTrainedModel, *args, **kwargs) -> list[Tensor]:
    """The logits of a call, once the layer is run."""
    found: list[Tensor] = []

    def call(*_) -> None:
        handle.remove()
        found.append(model(*args, **kwargs).logits)

    handle = layer.register_forward_pre_hook(call)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "falcon alibi"])
def test_a_forward_within_a_forward(name, stock, text) -> None:
    """A hook may call the model, or another one, without a cache or with one of its own."""
    model, other = (enable(copy.deepcopy(stock), FULL) for _ in range(2))
    short = text[:, :7]
    expected = stock(text).logits, stock(short).logits
    for inner in (model, other):
        for use_cache in (False, True):
            found = called_within(layers_of(model)[1], inner, short, use_cache=use_cache)
            got = model(text).logits
            assert torch.allclose(got, expected[0], atol=2e-4)
            assert torch.allclose(found[0], expected[1], atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("value", [2, 0.5])
@pytest.mark.parametrize("name", [*NAMES, "falcon alibi"])
def test_masks_of_other_values(name, stock, text, value: float) -> None:
    """As of packed texts: one line where transformers' model counts them as they are."""
    model = enable(copy.deepcopy(stock), FULL)
    mask = torch.ones_like(text) * value
    mask[0, :6] = 0
    if name in ("opt", "bloom", "falcon alibi"):
        with pytest.raises(InputError, match="zeros and ones") as error:
            model(text, attention_mask=mask)
        one_line(error)
        if name == "opt":
            model(text, attention_mask=mask, position_ids=torch.arange(24)[None])
        return
    expected, got = (one(text, attention_mask=mask).logits for one in (stock, model))
    assert torch.allclose(got[mask > 0], expected[mask > 0], atol=2e-4)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(text) -> None:
    """Other windows, fewer layers, more layers."""
    model = enable(small("llama"), FULL)
    for other in (small("gemma2").config, LlamaConfig(num_hidden_layers=1), LlamaConfig()):
        with pytest.raises(InputError, match="made for another model") as error:
            model(text, past_key_values=KeyformerCache(other, FULL))
        one_line(error)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gptj"])
def test_places_before_the_first_are_refused(stock, text, name) -> None:
    model = enable(copy.deepcopy(stock), FULL)
    with pytest.raises(InputError, match="at least 0, got -1") as error:
        model(text, position_ids=torch.arange(24)[None] - 1)
    one_line(error)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("gptj", {"input_ids": torch.arange(24).view(2, 12), "position_ids": torch.arange(12) + 3}),
        ("gptj", {"input_ids": torch.zeros(0, 5, dtype=torch.int64)}),
        ("opt", {"input_ids": torch.arange(12)}),
        ("opt", {"input_ids": torch.arange(12), "attention_mask": torch.ones(1, 12)}),
    ],
)
def test_shapes_that_stock_takes(name: str, stock, inputs) -> None:
    model = enable(copy.deepcopy(stock), FULL)
    got, expected = model(**inputs).logits, stock(**inputs).logits
    assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4)


@torch.no_grad()
def test_what_generate_was_asked_for_is_forgotten(name, stock, text) -> None:
    """A cache goes on in forward calls for as long as the table reaches."""
    table = {"opt": "max_position_embeddings", "cerebras": "n_positions", "gptj": "n_positions"}
    model = enable(small(name, **({table[name]: 40} if name in table else {})), FULL)
    cache = KeyformerCache(model.config, FULL)
    for limit in ("max_new_tokens", "max_length"):
        options = {limit: 15, "past_key_values": cache}
        output = model.generate(text[:, :10], return_dict_in_generate=True, **options)
        assert output.past_key_values is cache
        assert (cache.max_new_tokens, cache.max_length) == (None, None)
        model(text[:, :15], past_key_values=cache)
        cache.reset()
    cache.max_new_tokens = 50
    cache.reset()
    model(text, past_key_values=cache)


class OwnModel(MptModel):
    """A user's, in a module of its own."""


class OwnMpt(MptForCausalLM):
    """The same."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.transformer = OwnModel(config)


@torch.no_grad()
def test_subclasses_of_patched_models(text, monkeypatch) -> None:
    """They evict, and are given back; a module's name does not make it one of this project's."""
    config = small("mpt").config
    stock = OwnMpt(config).eval()
    model = enable(copy.deepcopy(stock), FULL)
    assert isinstance(model, OwnMpt) and type(model).__name__ == "OwnMpt"
    assert torch.equal(model.generate(text), stock.generate(text, use_cache=True))
    output = enable(model, HALF).generate(text, max_new_tokens=2, return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.shape[2] == 12
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    for own in (OwnMpt, OwnModel):
        monkeypatch.setattr(own, "__module__", "my_keyformer")
    disable_keyformer(model)
    assert type(model) is OwnMpt and type(model.transformer) is OwnModel


@torch.no_grad()
def test_disabled_models_are_as_they_were(name, stock, text) -> None:
    """Attribute for attribute, after all that a model is used for."""
    model = copy.deepcopy(stock)
    model.generate(text, max_new_tokens=2)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    enable(model, HALF).generate(text, max_new_tokens=2)
    disable_keyformer(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before


@torch.no_grad()
def test_a16_use_cache_is_kept(stock, text) -> None:
    """What the user has set counts; what the checkpoint's files say, for forward calls alone."""
    model = copy.deepcopy(stock)
    model.config.use_cache = model.generation_config.use_cache = False
    enable(model, HALF)
    assert model.config.use_cache is False
    assert model(text).past_key_values is None
    output = model.generate(text, max_new_tokens=2, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, KeyformerCache)
    options = {"max_new_tokens": 6, "use_cache": False}
    expected = stock.generate(text, **options)
    assert torch.equal(model.generate(text, **options), expected)
    for where in ("the call", "the model"):
        asked = copy.deepcopy(stock.generation_config)
        asked.update(**options, return_dict_in_generate=True)
        if where == "the model":
            enable(model, HALF).generation_config = asked
        output = model.generate(text, asked if where == "the call" else None)
        assert output.past_key_values is None and torch.equal(output.sequences, expected)
    assert disable_keyformer(model).config.use_cache is False
    assert model.generation_config.use_cache is False


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_continuous_batching_is_refused_where_it_would_not_evict(stock, text, name) -> None:
    model = enable(copy.deepcopy(stock), HALF)
    for begin in (
        model.init_continuous_batching,
        lambda: model.generate_batch(text.tolist(), max_new_tokens=2),
        lambda: model.continuous_batching_context_manager().__enter__(),
    ):
        with pytest.raises(InputError, match="continuous batching") as error:
            begin()
        one_line(error)
    assert enable(model, FULL).init_continuous_batching() is not None


@torch.no_grad()
def test_a17_the_decoder_alone_gives_all_hidden_states(stock, text) -> None:
    """After a call that asked for the last logits alone, and on the same cache."""
    model = enable(copy.deepcopy(stock), KeyformerConfig.preset("full", prefill_chunk=5))
    cache = KeyformerCache(model.config, model.get_decoder().keyformer_config)
    assert model(text[:, :12], past_key_values=cache, logits_to_keep=1).logits.shape[1] == 1
    hidden = model.get_decoder()(text[:, 12:], past_key_values=cache).last_hidden_state
    assert hidden.shape[1] == 12


@torch.no_grad()
def test_positional_arguments_are_transformers_own(stock, text) -> None:
    """In the order of the model's own forward, as without Keyformer."""
    import inspect

    mask = torch.ones_like(text)
    mask[0, :6] = 0
    given = {"input_ids": text, "attention_mask": mask}
    order = list(inspect.signature(type(stock.get_decoder()).forward).parameters)[1:4]
    arguments = [given.get(name) for name in order]
    model = enable(copy.deepcopy(stock), FULL)
    for one, other in ((stock, model), (stock.get_decoder(), model.get_decoder())):
        expected, got = one(*arguments)[0], other(*arguments)[0]
        real = mask.bool()
        assert torch.allclose(got[real], expected[real], atol=2e-4)


class Graph(nn.Module):
    """A small model with what changes what a forward computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self._active_adapter = ["one"]


CHANGES = {
    "a hook": lambda m: m.linear.register_forward_hook(lambda *_: None),
    "a hook on all modules": lambda m: nn.modules.module.register_module_forward_hook(
        lambda *_: None
    ),
    "an adapter": lambda m: m.__setattr__("_active_adapter", ["two"]),
    "a setting": lambda m: m.linear.__setattr__("scaling", {"two": 0.5}),
    "a weight elsewhere": lambda m: m.linear.__setattr__(
        "weight", nn.Parameter(m.linear.weight.clone())
    ),
    "training": lambda m: m.train(),
    "another module": lambda m: m.__setattr__("linear", nn.Linear(2, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a20_what_a_captured_step_depends_on(change: str) -> None:
    """Anything that would give other numbers shows in what a graph is compared with."""
    model = Graph().eval()
    before, hooks = keyformer.replay._state(model), keyformer.replay._hooks(model)
    assert keyformer.replay._state(model) == before and not any(hooks)
    handle = CHANGES[change](model)
    changed = keyformer.replay._state(model) != before
    assert changed or any(hooks)
    if hasattr(handle, "remove"):
        handle.remove()
        assert not any(hooks)


def test_a20_autocast_is_another_step() -> None:
    before = keyformer.replay._modes()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=True):
        assert keyformer.replay._modes() != before or not torch.cuda.is_available()
    with torch.inference_mode():
        assert keyformer.replay._modes() != before
