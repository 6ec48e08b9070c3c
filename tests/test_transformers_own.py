"""What transformers' own tests ask of every model: method full against the stock model.

Each test is named after the one of transformers whose question it puts, and the stock model
answers it. What is different under eviction has tests of its own.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from conftest import kept, small
from families import FAMILIES
from originals import ORIGINALS
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, set_seed

from keyformer import InputError, KeyformerCache, KeyformerConfig, disable_keyformer
from keyformer import enable_keyformer as enable

ALIKE = ("llama yarn", "qwen2", "mistral", "gpt2")
"""Families that are one of the others but for a bias, a frequency or a weight's layout."""

NAMES = [*(family for family in FAMILIES if family not in ALIKE), *ORIGINALS]
DROPOUTS = (
    *("attention_dropout", "hidden_dropout", "dropout", "activation_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
)
WINDOWED = ("mistral window", "gemma2", "gemma3_text")
"""Whose stock cache cannot be cropped: tokens that left a window are gone."""

EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 10, "num_return_sequences": 2},
    "beam_search": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
    "beam_sample": {"num_beams": 2, "do_sample": True, "temperature": 0.7},
}
EVICTING = KeyformerConfig(kv_cache=50, seed=0)


CROPPABLE = [name for name in NAMES if name not in WINDOWED]
RIGHT_EAGER = [name for name in NAMES if name != "falcon alibi"]
"""Stock's eager attention adds Falcon's ALiBi twice."""

WITH_SDPA = [name for name in NAMES if name not in ("mpt", "gptj", "bloom", "gemma2")]
ALIKE_IN_BOTH = [name for name in WITH_SDPA if name != "falcon alibi"]
"""Models that have sdpa in transformers, and those of which it agrees with eager attention."""


def in_turn(names: Iterable[str], ways: Iterable[Any], each: int = 1) -> list[tuple[str, Any]]:
    """Pairs: every way for the paper's models, and as many as ``each`` in turn for the others."""
    ways, others = [*ways], [name for name in names if name not in ORIGINALS]
    some = [
        (name, ways[(number + more) % len(ways)])
        for number, name in enumerate(others)
        for more in range(each)
    ]
    return some + [(name, way) for name in ORIGINALS for way in ways]


def dropping(name: str, dropout: float) -> PreTrainedModel:
    """The small model with that rate of dropout everywhere."""
    if name not in ORIGINALS:
        return small(name, **dict.fromkeys(DROPOUTS, dropout))
    model = small(name)
    for key in {*DROPOUTS} & {*vars(model.config)}:
        setattr(model.config, key, dropout)
    model = type(model)(model.config).eval()
    for module in model.modules() if name == "mpt" else ():  # its configuration takes 0 or 1
        for key in {"attn_dropout_p", "hidden_dropout"} & {*vars(module)}:
            setattr(module, key, dropout)
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


@pytest.fixture(params=NAMES)
def name(request) -> str:
    """Each family, and each of the paper's models: what takes it runs for all of them."""
    return request.param


@pytest.fixture
def stock(name) -> PreTrainedModel:
    """transformers' own model, small and random."""
    return kept(name)


@pytest.fixture
def prompt() -> Tensor:
    """Two prompts of 12 tokens."""
    return torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(2))


def close(got: Tensor, expected: Tensor, atol: float = 2e-4) -> None:
    """The same dtype and shape, and nearly the same values."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=atol)


def close_where_real(got: Any, expected: Any, real: Tensor) -> None:
    """:func:`close`, but for what queries that are padding give: of every layer, for one step.

    Parameters
    ----------
    got, expected
        A tuple of hidden states (rows, queries, hidden) or weights (rows, heads, queries, keys).
    real
        (batch, tokens) bool of the prompt; rows may be several for each sequence of the batch.
    """
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        rows, queries = one.shape[0], one.shape[-2]
        shown = torch.ones(rows, queries, dtype=torch.bool)
        if queries >= real.shape[1]:
            shown[:, : real.shape[1]] = real.repeat_interleave(rows // len(real), dim=0)
        if one.ndim == 4:
            one, other = one.transpose(1, 2), other.transpose(1, 2)
        close(one[shown], other[shown])


def alike(got: Any, expected: Any, real: Tensor) -> None:
    """Two of generate's dict outputs have the same parts, with the same shapes and values."""
    assert list(got) == list(expected)
    assert torch.equal(got.sequences, expected.sequences)
    for part in ("scores", "logits"):
        if part in expected:
            assert len(got[part]) == len(expected[part])
            for one, other in zip(got[part], expected[part], strict=True):
                close(one, other, atol=1e-3)
    if "sequences_scores" in expected:
        close(got.sequences_scores, expected.sequences_scores)
        assert torch.equal(got.beam_indices, expected.beam_indices)
    for part in ("attentions", "hidden_states"):
        if part in expected:
            assert len(got[part]) == len(expected[part])
            for one, other in zip(got[part], expected[part], strict=True):
                close_where_real(one, other, real)


def wanted_from(name: str) -> dict[str, bool]:
    """All outputs, but for weights where the stock model's eager attention is wrong."""
    return {**EVERYTHING, "output_attentions": name != "falcon alibi"}


def generated(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    """generate with a seed and a fixed length, so that two models can be compared."""
    set_seed(0)
    length = options.pop("length", 4)
    return model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, **options)


# generate's outputs


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, MODES, each=2))
def test_generate_dict_outputs_use_cache(name, stock, evicting, full, padded, mode: str) -> None:
    """Same parts, shapes, dtypes and values; a step's weights are (rows, heads, 1, columns)."""
    options = {**MODES[mode], **wanted_from(name)}
    expected = generated(stock, padded, **options)
    alike(generated(evicting(full), padded, **options), expected, padded["attention_mask"].bool())


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, ["greedy", "beam_search"]))
def test_generate_dict_outputs(name, stock, evicting, full, padded, mode: str) -> None:
    """With use_cache=False: every step gives the outputs of the whole text, and no cache."""
    options = {**MODES[mode], **wanted_from(name), "length": 3, "use_cache": False}
    expected = generated(stock, padded, **options)
    alike(generated(evicting(full), padded, **options), expected, padded["attention_mask"].bool())


@pytest.mark.parametrize(("name", "mode"), in_turn(NAMES, ["greedy", "beam_search"]))
def test_generate(stock, evicting, full, prompt, mode: str) -> None:
    """A row whose mask ends in zeros, as transformers' own tests have them: its first token comes
    from a column that is not shown itself, and sees those that are."""
    mask = torch.ones_like(prompt)
    mask[0, 5:] = 0
    inputs = {"input_ids": prompt, "attention_mask": mask}
    expected = generated(stock, inputs, **MODES[mode])
    assert torch.equal(generated(evicting(full), inputs, **MODES[mode]), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "falcon", *ORIGINALS])
def test_generate_dict_outputs_in_bfloat16(name, full, padded) -> None:
    """What is float32 in a stock model of that dtype is float32, and nothing else."""
    stock = small(name).to(torch.bfloat16)
    expected = generated(stock, padded, length=2, **EVERYTHING)
    got = generated(enable(copy.deepcopy(stock), full), padded, length=2, **EVERYTHING)
    for part in ("attentions", "hidden_states"):
        for one, other in zip(got[part], expected[part], strict=True):
            assert [t.dtype for t in one] == [t.dtype for t in other]
            assert [t.shape for t in one] == [t.shape for t in other]
    for part in ("scores", "logits"):
        assert [t.dtype for t in got[part]] == [t.dtype for t in expected[part]]


@pytest.mark.parametrize(("name", "num_beams"), in_turn(NAMES, [1, 2]))
def test_generate_from_inputs_embeds(stock, evicting, full, padded, num_beams: int) -> None:
    """With input_ids beside them and without; other embeddings give other scores."""
    model = evicting(full)
    mask = {"attention_mask": padded["attention_mask"]}
    options = {"num_beams": num_beams, "return_dict_in_generate": True, "output_scores": True}
    options["length"] = 3
    embeds = stock.get_input_embeddings()(padded["input_ids"]).detach()
    first = None
    for inputs in (
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "input_ids": padded["input_ids"]},
        {"inputs_embeds": embeds.flip(1), "input_ids": padded["input_ids"]},
    ):
        expected = generated(stock, {**inputs, **mask}, **options)
        got = generated(model, {**inputs, **mask}, **options)
        alike(got, expected, padded["attention_mask"].bool())
        first = first or got
    assert not torch.allclose(got.scores[0], first.scores[0])


@pytest.mark.parametrize(("name", "embeds"), in_turn(NAMES, [False, True]))
def test_generate_continue_from_past_key_values(stock, evicting, full, prompt, embeds) -> None:
    """Three tokens and then one more on the cache that generate returned equal four at once."""
    texts = []
    for model in (stock, evicting(full)):
        look_up = model.get_input_embeddings()
        given = {"inputs_embeds": look_up(prompt).detach()} if embeds else {"input_ids": prompt}
        out = generated(model, given, length=3, return_dict_in_generate=True)
        cache, text = out.past_key_values, out.sequences
        if embeds:
            read = torch.cat([prompt, text], dim=1)
            given = {"inputs_embeds": look_up(read).detach()}
        else:
            given = {"input_ids": text}
        more = generated(model, {**given, "past_key_values": cache}, length=1)
        texts.append(torch.cat([text, more[:, -1:]], dim=1))
    assert torch.equal(*texts)
    assert torch.equal(texts[0][:, -4:], generated(stock, {"input_ids": prompt})[:, -4:])


@pytest.mark.parametrize("name", ["gpt2", "gptj", "cerebras"])
def test_generate_with_token_type_ids(name, stock, evicting, full, padded) -> None:
    """Which these models add to their embeddings."""
    kinds = torch.randint(1, 61, padded["input_ids"].shape, generator=torch.Generator())
    inputs = {**padded, "token_type_ids": kinds}
    expected = generated(stock, inputs, length=8)
    assert torch.equal(generated(evicting(full), inputs, length=8), expected)
    assert not torch.equal(generated(stock, padded, length=8), expected)


# Assisted decoding and prompt lookup


def another(model: PreTrainedModel) -> PreTrainedModel:
    """A model that guesses some of its tokens right."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return other


def repeating() -> dict[str, Tensor]:
    """One prompt that says things twice, so that a look-up finds candidates."""
    once = torch.randint(1, 61, (1, 6), generator=torch.Generator().manual_seed(4))
    text = torch.cat([once, once, once[:, :3]], dim=1)
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


def candidates_by(kind: str, model: PreTrainedModel, stock: PreTrainedModel) -> dict[str, Any]:
    """generate's options; an assistant is the model itself or a stock model of other weights."""
    if kind == "prompt lookup":
        return {"prompt_lookup_num_tokens": 3}
    assistant = model if kind == "same" else another(stock)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    return {"assistant_model": assistant}


ASSISTED = ["same", "random", "prompt lookup"]


@pytest.mark.parametrize(("name", "kind"), in_turn(CROPPABLE, ASSISTED))
def test_assisted_decoding_matches_greedy_search(name, stock, evicting, full, kind: str) -> None:
    outputs = []
    for model in (copy.deepcopy(stock), evicting(full)):
        options = candidates_by(kind, model, stock)
        outputs.append(generated(model, repeating(), length=6, **options, **wanted_from(name)))
    alike(outputs[1], outputs[0], torch.ones(1, 15, dtype=torch.bool))
    greedy = generated(stock, repeating(), length=6)
    assert torch.equal(outputs[1].sequences, greedy)


@pytest.mark.parametrize(("name", "kind"), in_turn(CROPPABLE, ASSISTED[1:]))
def test_assisted_decoding_sample(name, stock, evicting, full, kind: str) -> None:
    texts = []
    for model in (copy.deepcopy(stock), evicting(full)):
        options = candidates_by(kind, model, stock)
        texts.append(generated(model, repeating(), length=6, do_sample=True, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", ASSISTED)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", *ORIGINALS])
class TestAssistedDecodingUnderEviction:
    """Tokens that were rejected cannot be taken back once others have left for them."""

    def test_it_is_refused_before_anything_is_generated(self, name, stock, kind: str) -> None:
        model = enable(copy.deepcopy(stock), EVICTING)
        options = candidates_by(kind, model, stock)
        called: list[Any] = []
        for one in (model, options.get("assistant_model", model)):
            one.register_forward_pre_hook(lambda *_: called.append(1))
        for given in (
            {},
            {"past_key_values": KeyformerCache(model.config, KeyformerConfig(kv_budget=15))},
        ):
            with pytest.raises(InputError) as refused:
                generated(model, repeating(), length=6, **options, **given)
            assert len(str(refused.value).splitlines()) == 1
        assert not called

    def test_it_is_not_where_the_budget_holds_all(self, name, stock, full, kind: str) -> None:
        """But for layers with a window, whose tokens are let go whatever the budget."""
        expected = generated(stock, repeating(), length=6)
        model = enable(copy.deepcopy(stock), KeyformerConfig(kv_budget=64, seed=0))
        options = candidates_by(kind, model, stock)
        if name in WINDOWED:
            with pytest.raises(InputError, match="layers without a window"):
                generated(model, repeating(), length=6, **options)
            return
        assert torch.equal(generated(model, repeating(), length=6, **options), expected)
        if kind == "same":
            return  # whose cache as an assistant is one of its own method
        enable(model, EVICTING)
        given = {"past_key_values": KeyformerCache(model.config, full)}
        assert torch.equal(generated(model, repeating(), length=6, **options, **given), expected)


@pytest.mark.parametrize("name", ["llama", *ORIGINALS])
def test_an_assistant_that_evicts_is_refused(name, stock, full) -> None:
    """Its own tokens are rejected too; without eviction it gives the text that stock gives."""
    model = enable(copy.deepcopy(stock), full)
    assistant = candidates_by("random", model, stock)["assistant_model"]
    expected = generated(stock, repeating(), length=6)
    called: list[Any] = []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    enable(assistant, EVICTING).register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(InputError) as refused:
        generated(model, repeating(), length=6, assistant_model=assistant)
    assert len(str(refused.value).splitlines()) == 1 and not called
    enable(assistant, full)
    got = generated(model, repeating(), length=6, assistant_model=assistant)
    assert torch.equal(got, expected)


# Training


def gradients(model: PreTrainedModel, inputs: Tensor, **options: Any) -> dict[str, Tensor]:
    """By name, of the parameters that are trained; and the loss."""
    model.train().zero_grad()
    set_seed(0)
    loss = model(inputs, labels=inputs, **options).loss
    loss.backward()
    found = {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {**found, "loss": loss.detach()}


def same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of the same parameters, and close by the size of each."""
    assert got.keys() == expected.keys() and len(got) > 1
    for key, gradient in expected.items():
        assert torch.isfinite(got[key]).all()
        assert (got[key] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, key


@pytest.mark.parametrize(("name", "dropout"), in_turn(NAMES, [0.0, 0.2]))
def test_training(name, full, prompt, dropout: float) -> None:
    """Dropout is drawn as the stock model draws it."""
    stock = dropping(name, dropout)
    model = enable(copy.deepcopy(stock), full)
    expected = gradients(stock, prompt)
    same_gradients(gradients(model, prompt), expected)
    if dropout:
        with torch.no_grad():
            assert not torch.allclose(stock.eval()(prompt, labels=prompt).loss, expected["loss"])


@pytest.mark.parametrize(("name", "reentrant"), in_turn(NAMES, [None, False, True]))
def test_training_gradient_checkpointing(stock, evicting, full, prompt, reentrant) -> None:
    """Layers that are computed again find what they found the first time."""
    model = evicting(full)
    expected = gradients(copy.deepcopy(stock), prompt)
    options = {} if reentrant is None else {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
    same_gradients(gradients(model, prompt), expected)
    model.gradient_checkpointing_disable()
    same_gradients(gradients(model, prompt), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon", *ORIGINALS])
def test_training_without_a_cache_under_eviction(name, stock, evicting, prompt) -> None:
    """Nothing leaves where there is no cache, checkpointed or not."""
    model = evicting(EVICTING)
    expected = gradients(copy.deepcopy(stock), prompt, use_cache=False)
    same_gradients(gradients(model, prompt, use_cache=False), expected)
    model.gradient_checkpointing_enable()
    same_gradients(gradients(model, prompt, use_cache=False), expected)


@pytest.mark.parametrize(("name", "reentrant"), in_turn(NAMES, [False, True]))
def test_enable_input_require_grads_with_gradient_checkpointing(
    stock, evicting, full, prompt, reentrant: bool
) -> None:
    """As adapters are trained: the weights are frozen, but for one of the first layer."""
    found = []
    for model in (copy.deepcopy(stock), evicting(full)):
        model.requires_grad_(False)
        trained = next(p for key, p in model.named_parameters() if ".0." in key and p.ndim == 2)
        trained.requires_grad_(True)
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        model.enable_input_require_grads()
        found.append(gradients(model, prompt))
        model.disable_input_require_grads()
    same_gradients(found[1], found[0])


# Attention: its outputs and its implementations


@pytest.mark.parametrize("name", RIGHT_EAGER)
def test_attention_outputs(name, stock, evicting, full, prompt) -> None:
    """Asked for by argument and by configuration, with hidden states or not, cache or not."""
    real = torch.ones_like(prompt, dtype=torch.bool)
    with torch.no_grad():
        for options in (
            {"output_attentions": True},
            {"output_attentions": True, "use_cache": False},
            {"output_attentions": True, "output_hidden_states": True},
            {},
        ):
            outputs = []
            for model in (copy.deepcopy(stock), evicting(full)):
                if not options:
                    model.config.output_attentions = True
                outputs.append(model(prompt, **options))
            expected, got = outputs
            assert list(got) == list(expected)
            for part in {"attentions", "hidden_states"} & set(expected):
                close_where_real(got[part], expected[part], real)
            step = {"input_ids": prompt[:, :1], "output_attentions": True}
            if "past_key_values" in expected:
                ours = model(past_key_values=got.past_key_values, **step).attentions
                theirs = stock(past_key_values=expected.past_key_values, **step).attentions
                close_where_real(ours, theirs, real)


@pytest.mark.parametrize("name", ["llama", "opt", "falcon", "bloom", *ORIGINALS])
def test_attention_outputs_under_eviction(name, stock, prompt) -> None:
    """The stock model's shapes too: a column for each token, which weighs nothing once it left."""
    model = enable(copy.deepcopy(stock), KeyformerConfig(kv_budget=6, seed=0))
    inputs = {"input_ids": prompt}
    options = {"return_dict_in_generate": True, "output_attentions": True}
    expected = generated(stock, inputs, **options).attentions
    got = generated(model, inputs, **options).attentions
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert [t.shape for t in ours] == [t.shape for t in theirs]
        for weights in ours:
            close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            if step:
                assert ((weights > 0).sum(-1) <= 7).all()


def served(model: PreTrainedModel, kind: str) -> bool:
    """Set an attention implementation; False if it is refused, in one line."""
    try:
        model.set_attn_implementation(kind)
    except InputError as refusal:
        assert len(str(refusal).splitlines()) == 1
        return False
    return True


@pytest.mark.parametrize(
    ("before", "after", "padding"),
    [
        ("eager", "sdpa", "none"),
        ("eager", "sdpa", "left"),
        ("sdpa", "eager", "left"),
        ("sdpa", "eager", "right"),
    ],
)
@pytest.mark.parametrize("name", ALIKE_IN_BOTH)
def test_eager_matches_sdpa_inference(
    name, stock, full, prompt, before: str, after: str, padding: str
) -> None:
    """One implementation set before enabling and the other after it: the same logits."""
    assert stock._supports_sdpa
    mask = torch.ones_like(prompt)
    if padding != "none":
        mask[0, slice(0, 4) if padding == "left" else slice(8, 12)] = 0
    inputs: dict[str, Tensor] = {"input_ids": prompt}
    if padding != "none":
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs |= {"attention_mask": mask, "position_ids": places}
    real = mask.bool()
    with torch.no_grad():
        theirs = copy.deepcopy(stock)
        expected = theirs(**inputs).logits[real]
        theirs.set_attn_implementation(before)
        model = enable(theirs, full)
        close(model(**inputs).logits[real], expected, atol=1e-3)
        if served(model, after):
            close(model(**inputs).logits[real], expected, atol=1e-3)
            close(model(**inputs, use_cache=False).logits[real], expected, atol=1e-3)
        disable_keyformer(model)
        close(model(**inputs).logits[real], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "eager") for name in NAMES), *((name, "sdpa") for name in WITH_SDPA)],
)
def test_can_set_attention_dynamically(name, stock, evicting, padded, kind: str) -> None:
    """An evicting model still evicts, and the text is the one from before."""
    model = evicting()
    texts, caches = [], []
    for _ in range(2):
        caches.append(KeyformerCache(model.config, KeyformerConfig(kv_budget=8, seed=0)))
        try:
            texts.append(generated(model, padded, past_key_values=caches[-1]))
        except InputError:
            assert texts  # refused after the implementation was set
            return
        if not served(model, kind):
            return
    assert torch.equal(*texts)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.positions, other.positions)
        assert one.keys.shape[2] <= 16


@pytest.mark.parametrize("name", ["llama", "opt", "falcon", "bloom", *ORIGINALS])
def test_eager_matches_sdpa_inference_in_bfloat16(name, full, prompt) -> None:
    stock = small(name).to(torch.bfloat16)
    with torch.no_grad():
        expected = stock(prompt).logits.float()
        model = enable(copy.deepcopy(stock), full)
        for kind in ("eager", "sdpa"):
            if stock._supports_sdpa or kind == "eager":
                served(model, kind)
            logits = model(prompt).logits
            assert logits.dtype == torch.bfloat16
            assert (logits.float() - expected).norm() < 0.04 * expected.norm()


# The model as an object


@pytest.mark.parametrize(("name", "size"), in_turn(NAMES, [50, 77]))
def test_resize_tokens_embeddings(stock, evicting, full, prompt, size: int) -> None:
    """Fewer tokens and more, after enabling."""
    inputs = {"input_ids": prompt.clamp(max=49)}
    theirs, model = copy.deepcopy(stock), evicting(full)
    for one in (theirs, model):
        set_seed(0)
        one.resize_token_embeddings(size, mean_resizing=False)
        assert one.config.vocab_size == size
    with torch.no_grad():
        logits = model(**inputs).logits
        assert logits.shape[-1] == size
        close(logits, theirs(**inputs).logits)
    assert torch.equal(generated(model, inputs), generated(theirs, inputs))


def through_torch_save(thing: Any) -> Any:
    """Written and read back."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize(("name", "way"), in_turn(NAMES, ["torch.save", "deepcopy"]))
def test_torch_save_load(name, stock, padded, way: str) -> None:
    """A copy is of the same class, evicts alike, and can be disabled."""
    # Not a copy of ``stock``: transformers' models that were once asked for hidden states hold
    # hooks that cannot be pickled.
    model = enable(small(name), EVICTING)
    twin = COPIES[way](model)
    assert type(twin) is type(model)
    caches = [KeyformerCache(model.config, EVICTING) for _ in range(2)]
    texts = [
        generated(one, padded, length=5, past_key_values=cache)
        for one, cache in zip((model, twin), caches, strict=True)
    ]
    assert torch.equal(*texts)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.positions, other.positions)
    if way == "torch.save":
        expected = generated(stock, padded, length=5)
        assert torch.equal(generated(disable_keyformer(twin), padded, length=5), expected)
        assert torch.equal(generated(model, padded, length=5), texts[0])


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", ["full", "keyformer"])
@pytest.mark.parametrize("name", ["gemma3_text", "mistral window", "mpt", "gptj"])
def test_copy_of_a_cache_in_use(name, stock, prompt, method: str, way: str) -> None:
    """Generation goes on identically, and a step on one leaves the other as it was."""
    config = KeyformerConfig.preset(method, kv_cache=50, seed=0)
    model = enable(copy.deepcopy(stock), config)
    cache = KeyformerCache(model.config, config)
    text = generated(model, {"input_ids": prompt}, length=3, past_key_values=cache)
    twin = COPIES[way](cache)
    caches = (cache, twin, copy.deepcopy(twin))
    texts = [generated(model, {"input_ids": text}, past_key_values=one) for one in caches]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    for layers in zip(*(one.layers for one in caches), strict=True):
        assert torch.equal(layers[0].positions, layers[1].positions)
        assert layers[0].keys.data_ptr() != layers[1].keys.data_ptr()


def test_save_load(stock, evicting, padded, tmp_path) -> None:
    """A saved model is stock's: by name, and for whoever loads it without this package."""
    model = evicting(EVICTING)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [type(stock).__name__]
    assert saved["model_type"] == stock.config.model_type
    assert not any("keyformer" in file.read_text() for file in tmp_path.glob("*.json"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(stock)
    if stock.config._attn_implementation == "eager":
        loaded.set_attn_implementation("eager")
    assert torch.equal(generated(loaded, padded), generated(stock, padded))
    assert torch.equal(generated(enable(loaded, EVICTING), padded), generated(model, padded))


def test_stock_cache_after_disable(stock, evicting, full, padded) -> None:
    """A copy that was disabled takes transformers' own caches again."""
    model = disable_keyformer(copy.deepcopy(evicting(full)))
    texts = [
        generated(one, padded, past_key_values=DynamicCache(config=one.config))
        for one in (stock, model)
    ]
    assert torch.equal(*texts)
