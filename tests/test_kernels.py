"""The Triton kernels against the torch backend and the oracle: on a GPU, or interpreted.

Without a GPU they run in Triton's interpreter. Both backends draw the same noise. Sizes are
such that prompts and slots fill more than one block.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from cases import Case
from conftest import small_stock
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithm import cases, check_against_oracle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

import keyformer.kernels.decode
import keyformer.replay
from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer
from keyformer.cache import KeyformerLayer
from keyformer.config import CACHE_DTYPES, METHODS
from keyformer.few_rows import FewRows
from keyformer.kernels.decode import split
from keyformer.kernels.noise import LOG2_E, head_row, query_row, spread, zeta
from keyformer.kernels.rotary import rotate_neighbours
from keyformer.score import first_row, noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF_PRECISION = [torch.float16]
if DEVICE == "cuda":
    HALF_PRECISION.append(torch.bfloat16)  # the interpreter has no such products
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def with_backend(case: Case, backend: str) -> Case:
    config = dataclasses.replace(case.config, backend=backend)
    return dataclasses.replace(case, config=config, device=DEVICE)


def check_same(case: Case, tolerance: float = 1e-4) -> None:
    """Outputs, slots, positions and scores after every forward call."""
    runs = [with_backend(case, backend).run() for backend in ("torch", "triton")]
    for (expected, part, expected_output), (got, _, output) in zip(*runs, strict=True):
        real = case.real(*part)
        error = (output - expected_output).transpose(1, 2)[real].abs().max()
        assert error < tolerance
        expected, got = expected.layers[0], got.layers[0]
        held = min(layer.positions.shape[-1] for layer in (expected, got))
        assert torch.equal(got.positions[..., :held], expected.positions[..., :held])
        for layer in (expected, got):
            assert (layer.positions[..., held:] == -1).all()  # reserved, or grown in a block
        filled = expected.positions[..., :held] >= 0
        for name in ("keys", "key_scales", "values", "value_scales", "scores"):
            ours, theirs = (getattr(layer, name)[:, :, :held] for layer in (got, expected))
            assert torch.allclose(ours[filled], theirs[filled], atol=tolerance), name


@settings(max_examples=6, deadline=None)
@given(case=cases)
def test_equals_literal_algorithm(case: Case) -> None:
    """Every option, position scheme and group, padded batches, later prompts: Algorithm 1."""
    check_against_oracle(with_backend(case, "triton"))


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    config = KeyformerConfig.preset(method, kv_cache=80, seed=3)
    check_same(Case(config, 1, 2, [150, 90], [1, 1, 20, 1], alibi=True, seed=0))


@pytest.mark.parametrize(
    ("rule", "budgets"),
    [
        ("observed(queries=8,pooling=3)", "uniform"),
        ("largest", "uniform"),
        ("0.6*accumulated + 0.4*last", "adaptive"),
        ("leverage", "uniform"),
        ("accumulated", "adaptive"),
        ("recall(queries=4,pooling=3,strength=0.5)", "uniform"),
    ],
)
@pytest.mark.filterwarnings("ignore:the decode kernels do not know")
def test_rules_and_budgets(rule: str, budgets: str) -> None:
    """The prefill kernel gives what a rule asks of a prompt, a later one and a step; the decode
    kernel keeps each head to its own budget."""
    config = KeyformerConfig(kv_cache=60, seed=3, rule=rule, budgets=budgets)
    check_same(Case(config, 2, 2, [90, 50], [1, 1, 20, 1], alibi=True, seed=0))


def test_a_rule_that_the_decode_kernels_do_not_know_is_said() -> None:
    config = KeyformerConfig(kv_cache=60, rule="largest", seed=3, backend="triton")
    keyformer.backends.choice._say_slow.cache_clear()
    with pytest.warns(UserWarning, match="do not know the rule largest: torch decides") as said:
        list(Case(config, 1, 1, [9], [1, 1], True, 0, device=DEVICE).run())
    assert len(said) == 1


@pytest.mark.parametrize(
    ("method", "score"),
    [("keyformer", "per_layer"), ("h2o", "shared"), ("window", "per_layer")],
)
def test_scores_added_up_by_several_programs(monkeypatch, method: str, score: str) -> None:
    """A range of slots each, one of them empty; padding in a step, and slots not filled yet."""
    monkeypatch.setattr(keyformer.kernels.decode, "SETTLED", 64)
    config = KeyformerConfig.preset(method, kv_cache=90, seed=3, score=score)
    check_same(Case(config, 1, 3, [150, 60], [1, 2, 1], alibi=True, seed=0))
    roomy = dataclasses.replace(config, kv_budget=250)
    check_same(Gap(roomy, 1, 2, [90, 140], [1] * 2, alibi=True, seed=0))


def turned_round(path: Path):
    """keyformer.kernels.decode with the ids of programs in reverse: the last starts first."""
    source = Path(keyformer.kernels.decode.__file__).read_text()
    turned = r"(tl.num_programs(\1) - 1 - tl.program_id(\1))"
    path.write_text(re.sub(r"tl\.program_id\((\d)\)", turned, source))
    spec = importlib.util.spec_from_file_location("decode_turned_round", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("settled", [2048, 16])
def test_a19_program_ids_turned_round(monkeypatch, tmp_path, settled: int) -> None:
    """Whatever ids the programs have that start first, nobody waits for one yet to start.

    On a GPU those that wait are more than it runs at once: it would hang. In the interpreter,
    where a program ends before the next one starts, nobody may have to wait at all.
    """
    ordinary, turned = keyformer.kernels.decode, turned_round(tmp_path / "turned.py")
    for module in (ordinary, turned):
        monkeypatch.setattr(module, "SETTLED", settled)
    if DEVICE == "cpu":

        def wait(finished, parts) -> None:
            stored = tl.atomic_add(finished, 0)
            assert stored >= parts, "waits for a program that has not started"

        monkeypatch.setattr(turned, "_wait", wait)
    config = KeyformerConfig(kv_budget=40, seed=3, backend="triton")
    kv_heads = 1 if DEVICE == "cpu" else 400
    # The second sequence is padding in a decode step too.
    case = Gap(config, kv_heads, 2, [50, 45], [1] * 2, alibi=True, seed=0, device=DEVICE)
    ends = []
    for module in (ordinary, turned):
        with monkeypatch.context() as patched:
            patched.setattr(ordinary, "step", module.step)
            outputs = []
            for cache, _, output in case.run():  # noqa: B007
                outputs.append(output)
        layer = cache.layers[0]
        assert not layer.finished.any()
        ends.append([*outputs, *(getattr(layer, name) for name in KeyformerLayer.per_slot)])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(("head_dim", "group"), [(64, 4), (80, 1), (128, 1), (256, 1)])
def test_head_sizes(head_dim: int, group: int) -> None:
    config = KeyformerConfig(kv_cache=90, seed=3)
    check_same(Case(config, 1, group, [90, 80], [1, 1, 3, 1], False, 0, head_dim=head_dim))


@pytest.mark.parametrize("kind", CACHE_DTYPES[1:])
@pytest.mark.parametrize("positions", ["original", "new"])
def test_quantized_slots(kind: str, positions: str) -> None:
    """Read as they are stored, but where keys are rotated when they are read; 2 scales of int4."""
    config = KeyformerConfig(kv_cache=80, seed=3, cache_dtype=kind, positions=positions)
    check_same(Case(config, 1, 2, [90, 60], [1, 1, 3, 1], True, 0, positions == "new", head_dim=64))


@pytest.mark.parametrize("dtype", HALF_PRECISION)
def test_half_precision(dtype: torch.dtype) -> None:
    """Close to what the same numbers give in float32."""
    config = KeyformerConfig(kv_cache=100, seed=3, backend="triton")
    exact = Case(config, 1, 2, [60, 40], [1, 1], True, 0, head_dim=64, device=DEVICE)
    half = dataclasses.replace(exact)
    for name in ("query", "key", "value"):
        rounded = getattr(exact, name).to(dtype)
        setattr(half, name, rounded)
        setattr(exact, name, rounded.float())
    for (one, part, output), (other, _, expected) in zip(half.run(), exact.run(), strict=True):
        real = exact.real(*part)
        error = (output.float() - expected).transpose(1, 2)[real].norm()
        assert error < 0.01 * expected.transpose(1, 2)[real].norm()
        scores = [cache.layers[0].scores.sum(-1) for cache in (one, other)]
        assert torch.allclose(*scores, rtol=0.01)
        assert one.layers[0].keys.dtype == output.dtype == dtype


def test_prompts_in_chunks() -> None:
    """Padding last in a chunk, a chunk of one token, and one that is padding alone."""
    case = Case(KeyformerConfig(kv_cache=50, seed=3), 1, 2, [23, 9], [1, 1], True, 0)
    slots = []
    for backend in ("torch", "triton"):
        one = with_backend(case, backend)
        cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), one.config)
        cache.max_new_tokens = 3
        real = one.real(0, 23).flip(1)
        one.real = lambda start, end, real=real: (
            real[:, start:end] if start < 23 else real[:, :1].expand(-1, end - start)
        )
        cache.expect(real)
        outputs = [
            one.attend(cache, 0, *piece).transpose(1, 2)[one.real(*piece)]
            for piece in ((0, 11), (11, 22), (22, 23), (23, 24), (24, 25))
        ]
        layer = cache.layers[0]
        slots.append((torch.cat(outputs), layer.scores, layer.keys, layer.positions))
    for ours, theirs in zip(*slots, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


class Gap(Case):
    """The first sequence has padding in its second decode step."""

    def real(self, start: int, end: int) -> torch.Tensor:
        real = super().real(start, end)
        real[0] &= torch.arange(start, end, device=self.device) != self.longest + 1
        return real


def test_padding_in_a_decode_step_changes_nothing() -> None:
    config = KeyformerConfig(kv_cache=50, seed=3)
    case = Gap(config, 2, 1, [20, 30], [1, 1, 1], alibi=True, seed=0)
    check_same(case)
    slots = [
        [getattr(cache.layers[0], name).clone() for name in ("positions", "scores", "keys")]
        for cache, _, _ in with_backend(case, "triton").run()
    ]
    for before, after in zip(slots[1], slots[2], strict=True):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])


def test_shared_scores() -> None:
    config = KeyformerConfig(kv_cache=40, score="shared", seed=7)
    layers = [
        Case(config, 2, 2, [17, 9], [1] * 3, alibi=True, seed=seed, device=DEVICE)
        for seed in range(2)
    ]
    caches = []
    for backend in ("torch", "triton"):
        config = dataclasses.replace(config, backend=backend)
        caches.append(KeyformerCache(PreTrainedConfig(num_hidden_layers=2), config))
        for part in layers[0].forwards():
            for number, case in enumerate(layers):
                case.attend(caches[-1], number, *part)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-4)


@pytest.mark.parametrize("kind", ["gumbel", "gaussian"])
def test_noise_of_ids_is_that_of_score(kind: str) -> None:
    """Both in the prompt and in steps, with ids beyond 32 bits."""
    config = KeyformerConfig(kv_cache=40, seed=7, noise=kind)
    case = Case(config, 2, 2, [17, 9], [1] * 3, alibi=True, seed=3, device=DEVICE)
    kept = []
    for backend, ids in (("torch", [5, 2**33 + 9]), ("triton", [5, 9]), ("triton", None)):
        config = dataclasses.replace(config, backend=backend)
        cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), config, noise_ids=ids)
        for part in case.forwards():
            case.attend(cache, 0, *part)
        kept.append(cache.layers[0].scores)
    assert torch.allclose(kept[0], kept[1], atol=1e-4)
    assert not torch.allclose(kept[0], kept[2], atol=1e-4)


@triton.jit(do_not_specialize=["row", "sequence", "head"])
def _draw(out, row, sequence, head, NOISE: tl.constexpr, KEYS: tl.constexpr):
    query, part = tl.program_id(0), tl.program_id(1)
    key = part * KEYS + tl.arange(0, KEYS)
    drawn = zeta(query_row(head_row(row, sequence, head), query, False), spread(key), NOISE)
    tl.store(out + query * KEYS * tl.num_programs(1) + key, drawn / LOG2_E)


@pytest.mark.parametrize("kind", ["gumbel", "gaussian"])
def test_noise_is_that_of_score(kind: str) -> None:
    """But for a constant, hash by hash, far into both tails, which few draws reach."""
    queries, keys, seed, layer = 16, 2**16, 2**40 + 5, 3
    got = torch.empty(queries, keys, device=DEVICE)
    _draw[(queries, 4)](got, first_row(seed, layer), 1, 2, NOISE=kind, KEYS=keys // 4)
    places = torch.arange(keys)
    expected = noise(kind, seed, layer, 4, places[:queries].expand(2, -1), places.expand(2, 2, -1))
    differences = got.cpu() - expected[1, 2]
    assert torch.allclose(differences, differences.mean(), atol=1e-4)
    assert expected.max() > 5


@pytest.mark.parametrize(
    ("arch", "layers", "heads", "options", "settings_"),
    [
        ("mpt", 2, 1, {"num_beams": 2}, {}),
        ("gptj", 1, 2, {}, {"positions": "new"}),
        ("gptj", 1, 1, {"num_beams": 2}, {}),
        ("cerebras", 2, 2, {}, {"score": "shared"}),
    ],
)
def test_generate(arch: str, layers: int, heads: int, options, settings_) -> None:
    """Greedy and with beams, whose slots the reordering kernel changes in place."""
    model = small_stock(arch, layers=layers, heads=heads).to(DEVICE)
    prompt = torch.randint(1, 61, (2, 10), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    texts = []
    for backend in ("torch", "triton"):
        config = KeyformerConfig(kv_cache=60, seed=1, backend=backend, **settings_)
        model = enable_keyformer(model, config)
        texts.append(
            model.generate(
                prompt, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, **options
            )
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize(("pairs", "slots", "waiting"), [(2, 300, 2), (8, 8192, 5), (128, 2048, 2)])
def test_parts_of_slots(pairs: int, slots: int, waiting: int) -> None:
    """Whole blocks that hold every slot; of few heads, all programs run at once."""
    part = split(pairs, slots, waiting, block=64, at_once=396)
    parts = -(-slots // part)
    assert part % 64 == 0
    assert (parts - 1) * part < slots <= parts * part
    assert pairs == 128 or pairs * (parts + waiting) <= 396


@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("parameters", [0, 1, 2])
def test_layer_norm_while_a_step_is_captured(width: int, parameters: int) -> None:
    """That of torch, with weight, bias, both or neither, and of two dimensions."""
    given = torch.randn(1 + parameters, 5, 1, width, device=DEVICE) + 2
    rows, weights = given[0], given[1:, 0, 0]
    layer = torch.nn.LayerNorm(width, elementwise_affine=False, device=DEVICE)
    for name, weight in zip(("weight", "bias"), weights, strict=False):
        setattr(layer, name, torch.nn.Parameter(weight))
    expected, of_two = layer(rows), torch.nn.functional.layer_norm(rows, rows.shape[1:])
    with FewRows(layer):
        assert torch.allclose(layer(rows), expected, atol=1e-5)
        assert torch.allclose(torch.nn.functional.layer_norm(rows, rows.shape[1:]), of_two)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 8), (24, 24), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_of_neighbours(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> None:
    """Those of GPT-J: pairs as complex numbers; views, one place for all heads or one for each."""
    heads, tokens = 3, 11
    table = create_sinusoidal_positions(40, rotary_dim).to(DEVICE)
    joined = torch.randn(2, tokens, 2, heads, head_dim, device=DEVICE, dtype=dtype)
    for kind in (1, heads):
        places = torch.randint(-1, 40, (2, kind, tokens), device=DEVICE)
        vectors = joined[:, :, 1].transpose(1, 2)
        got = rotate_neighbours(vectors, table, places)
        sin, cos = table[places.clamp(min=0)].chunk(2, dim=-1)
        turning = vectors[..., :rotary_dim].float().unflatten(-1, (-1, 2)).contiguous()
        turned = torch.view_as_complex(turning) * torch.complex(cos, sin)
        expected = torch.cat(
            [torch.view_as_real(turned).flatten(-2), vectors[..., rotary_dim:].float()], dim=-1
        )
        assert got.dtype == dtype
        assert torch.allclose(got.float(), expected, atol=1e-5 if dtype == torch.float32 else 3e-2)


@settings(max_examples=4, deadline=None)
@given(
    rounds=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 100),
    kind=st.sampled_from(CACHE_DTYPES),
)
def test_reordering_equals_a_copy_of_every_row(
    rounds: list[list[int]], seed: int, kind: str
) -> None:
    """Any parents, swaps and cycles among them, with steps in between."""
    config = KeyformerConfig(kv_budget=6, seed=seed, cache_dtype=kind)
    case = Case(config, 1, 1, [9, 5, 9, 7], [1] * len(rounds), alibi=False, seed=seed, layers=2)
    caches = {}
    for backend in ("torch", "triton"):
        run = with_backend(case, backend).run()
        cache, *_ = next(run)
        for parents in rounds:
            cache.reorder_cache(torch.tensor(parents, device=DEVICE))
            next(run)
        caches[backend] = cache
    for layers in zip(*(cache.layers for cache in caches.values()), strict=True):
        for name in KeyformerLayer.per_slot:
            ours, theirs = (getattr(layer, name) for layer in layers)
            assert torch.allclose(ours, theirs, atol=1e-5), name


def test_reordering_copies_only_what_differs() -> None:
    """After a copy two rows have their text in common until each goes on by itself."""
    config = KeyformerConfig(kv_budget=6, seed=0, backend="triton")
    case = Case(config, 1, 1, [8, 8], [1] * 3, alibi=False, seed=0, device=DEVICE)
    run = case.run()
    cache, *_ = next(run)
    cache.reorder_cache(torch.tensor([0, 0], device=DEVICE))
    next(run)
    keys = cache.layers[0].keys
    common = cache.layers[0].positions[0] == cache.layers[0].positions[1]
    common &= cache.layers[0].positions[0] < 8
    assert common.any()
    mark = keys[1].clone()
    keys[1][common] = 7.0  # would be overwritten by a copy of the whole row
    cache.reorder_cache(torch.tensor([0, 0], device=DEVICE))
    assert (keys[1][common] == 7.0).all()
    keys[1][common] = mark[common]
    assert torch.equal(keys[0], keys[1])


class Reads(TorchDispatchMode):
    """Notes which tensors operations read that none of these operations has made."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[weakref.ref] = []
        self.made: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in self.made:
                self.read.append(weakref.ref(tensor if tensor._base is None else tensor._base))
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.made.add(tensor.data_ptr())
        return result


class Recording:
    """A CUDA graph on a CPU: capturing changes no tensor, replaying computes anew in place.

    What was read while it was captured is read again from the same places, so it has to be there.
    """

    model = cache = None

    @contextmanager
    def capture(self):
        tensors = [
            getattr(owner, name)
            for owner in (self.cache.text, *self.cache.layers)
            for name in owner.__dict__
            if isinstance(getattr(owner, name), torch.Tensor)
        ]
        before = [tensor.clone() for tensor in tensors]
        with Reads() as reads:
            yield
        self.read = reads.read
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)

    def replay(self) -> None:
        assert all(tensor() is not None for tensor in self.read)
        graph, text, layers = self.cache.graph, self.cache.text, self.cache.layers
        counted = text.length, text.step
        text.length, text.step = counted[0] - 1, counted[1] - 1
        self.cache.columns.length -= 1
        self.cache.halfway = False
        for layer in layers:
            layer.length -= 1
        inputs = {**graph.inputs, "attention_mask": graph.mask}
        output = self.model.forward(**inputs, past_key_values=self.cache)
        graph.logits.copy_(output.logits)
        assert (text.length, text.step) == counted


def let_capture(monkeypatch, model, cache) -> None:
    """Without a GPU: steps are recorded as if they were captured there."""
    if DEVICE == "cpu":
        monkeypatch.setattr(Recording, "model", model)
        monkeypatch.setattr(Recording, "cache", cache)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.capture())
        monkeypatch.setattr(keyformer.replay, "CAPTURED_ON", ("cpu",))


@pytest.mark.parametrize(
    ("arch", "options"), [("mpt", {}), ("mpt", {"num_beams": 2}), ("gptj", {"do_sample": True})]
)
def test_replayed_steps_equal_run_ones(monkeypatch, arch: str, options) -> None:
    """All steps of generate but the first, and those of a second prompt on the same cache."""
    model = small_stock(arch, layers=1, heads=1).to(DEVICE)
    config = KeyformerConfig(kv_budget=9, seed=1, backend="triton")
    prompts = torch.randint(1, 61, (2, 2, 7), generator=torch.Generator().manual_seed(2))
    prompts = prompts.to(DEVICE)
    beams = options.get("num_beams", 1)
    ends = []
    for least in (100, 2):
        monkeypatch.setattr(keyformer.replay, "LEAST_STEPS", least)
        model = enable_keyformer(model, config)
        cache = KeyformerCache(model.config, config)
        let_capture(monkeypatch, model, cache)
        torch.manual_seed(0)
        text = prompts[0]
        for tokens, prompt in ((4, prompts[1]), (3, prompts[1][:, :0]))[: 3 - beams]:
            chosen = {"max_new_tokens": tokens, "min_new_tokens": tokens, **options}
            chosen["attention_mask"] = torch.ones_like(text)
            chosen["attention_mask"][0, 0] = 0  # padding: a mask of ones is dropped on the way
            text = model.generate(text, past_key_values=cache, **chosen)
            text = torch.cat([text, prompt], dim=-1)
        assert (cache.graph is not None) == (least == 2)
        ends.append((text, cache.layers[0].positions, torch.tensor(cache.get_seq_length())))
    assert all(map(torch.equal, *ends))


CHANGES = {
    "another weight": (
        2,
        lambda block: setattr(
            block.ffn.down_proj, "weight", torch.nn.Parameter(-block.ffn.down_proj.weight)
        ),
    ),
    "a setting": (2, lambda block: setattr(block.attn, "clip_qkv", 0.05)),
    "a hook": (1, lambda block: block.ffn.register_forward_hook(lambda m, i, output: -output)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a20_a_changed_model_is_captured_anew(monkeypatch, change: str) -> None:
    """Between two prompts on one cache; with hooks steps are run."""
    expected_captures, apply = CHANGES[change]
    config = KeyformerConfig(kv_budget=9, seed=1, backend="triton")
    prompts = torch.randint(1, 61, (2, 1, 7), generator=torch.Generator().manual_seed(2))
    prompts = prompts.to(DEVICE)
    captures: list[int] = []
    make = keyformer.replay.DecodeGraph.__init__
    monkeypatch.setattr(
        keyformer.replay.DecodeGraph,
        "__init__",
        lambda *args: (captures.append(1), make(*args))[1],
    )
    texts = []
    for least in (100, 2):
        monkeypatch.setattr(keyformer.replay, "LEAST_STEPS", least)
        model = enable_keyformer(small_stock("mpt", layers=1, heads=1).to(DEVICE), config)
        cache = KeyformerCache(model.config, config)
        let_capture(monkeypatch, model, cache)
        chosen = {"past_key_values": cache, "max_new_tokens": 4, "min_new_tokens": 4}
        text = model.generate(prompts[0], **chosen)
        apply(model.transformer.blocks[0])
        texts.append(model.generate(torch.cat([text, prompts[1]], dim=1), **chosen))
    assert torch.equal(*texts)
    assert len(captures) == expected_captures


def test_a_model_that_cannot_be_captured_is_run(monkeypatch) -> None:
    """With a warning that says why; the steps go on where they were."""
    model = small_stock("mpt", layers=1, heads=1).to(DEVICE)
    config = KeyformerConfig(kv_budget=6, seed=1, backend="triton")
    prompt = torch.randint(1, 61, (1, 7), device=DEVICE)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    expected = enable_keyformer(model, config).generate(prompt, **options)
    monkeypatch.setattr(keyformer.replay, "CAPTURED_ON", (DEVICE,))
    monkeypatch.setattr(keyformer.replay, "LEAST_STEPS", 1)

    def refuse() -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    with pytest.warns(UserWarning, match="run, not replayed: operation not permitted$"):
        assert torch.equal(model.generate(prompt, **options), expected)


def test_where_kernels_cannot_run(monkeypatch) -> None:
    """auto takes torch and triton says why not."""

    def query(**options) -> torch.Tensor:
        return torch.zeros(1, 1, 1, options.pop("head_dim", 64), device=DEVICE, **options)

    assert keyformer.backends.on_kernels("triton", query())
    # The interpreter is slow: without a GPU auto is the torch backend.
    assert keyformer.backends.on_kernels("auto", query()) == (DEVICE == "cuda")
    assert not keyformer.backends.on_kernels("torch", query())
    for impossible, others, reason in (
        (query(dtype=torch.float64), {}, "float64"),
        (query(head_dim=320), {}, "320"),
        (query(), {"softcap": 30.0, "window": None}, "softcap is 30"),
    ):
        with pytest.raises(InputError, match=reason):
            keyformer.backends.on_kernels("triton", impossible, **others)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="on cpu"):
        keyformer.backends.on_kernels("triton", query().cpu())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keyformer.backends.choice, "INSTALLED", False)
        with pytest.raises(InputError, match="not installed"):
            keyformer.backends.on_kernels("triton", query())
