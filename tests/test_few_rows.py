"""A decode step of few launches: its kernels, models under it, and what waits until it is read."""

from __future__ import annotations

import copy
import functools
import operator
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import small_stock
from families import FAMILIES, GROUPED
from test_kernels import DEVICE, HALF_PRECISION, no_gradients  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from keyformer import KeyformerCache, KeyformerConfig, enable_keyformer
from keyformer.compat import stock_class
from keyformer.few_rows import FewRows
from keyformer.kernels import linear, norm, rotary

pytestmark = pytest.mark.usefixtures("no_gradients")
DTYPES = [torch.float32, *HALF_PRECISION]
BY_TANH = nn.GELU("tanh")
ACTIVATIONS = {"none": nn.Identity(), "silu": F.silu, "gelu": F.gelu, "gelu by tanh": BY_TANH}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def among_nan(tensor: Tensor) -> Tensor:
    """The same, with NaN before and after it in memory."""
    memory = tensor.new_full((tensor.numel() + 128,), torch.nan)
    return memory[64:-64].view(tensor.shape).copy_(tensor)


def check_close(got: Tensor, expected: Tensor) -> None:
    """``expected`` has been computed in float64: sums are in float32, and rounded once."""
    precision = torch.finfo(got.dtype).eps
    assert torch.allclose(got.double(), expected, rtol=precision, atol=max(1e-5, precision / 8))


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many matrices each launch of linear maps takes."""
    counts, given = [], linear.linear

    def counted(x, weights, *args, **more) -> None:
        counts.append(len(weights))
        given(x, weights, *args, **more)

    monkeypatch.setattr(linear, "linear", counted)
    return counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 100, 1030])
@pytest.mark.parametrize("rows", [1, 2, 7, 20])
@pytest.mark.parametrize("how", ["none", "gelu by tanh", "silu gated", "gelu gated +", "none +"])
def test_linear_maps(rows, width, how, dtype, monkeypatch) -> None:
    """They are torch's, computed in float64; all that is written is theirs, and all of it."""
    if rows == 7:
        monkeypatch.setattr(linear, "processors", lambda device: 1)  # blocks are the larger ones
    activation, gated, added = how.partition(" gated")[0].strip(" +"), "gated" in how, "+" in how
    columns = [33, 33] if gated else [35] if added else [1, 36, 8][-1 - rows % 3 :]
    biased = [not gated, added, True]
    x, residual = (among_nan(random(rows, n, dtype=dtype)) for n in (width, columns[0]))
    weights = [among_nan(random(n, width, dtype=dtype) / width**0.5) for n in columns]
    some = [(n, among_nan(random(n, dtype=dtype))) for n in columns]
    biases = [bias if has else None for has, (_, bias) in zip(biased, some, strict=False)]
    maps = [x.double() @ weight.double().T for weight in weights]
    maps = [y if b is None else y + b.double() for y, b in zip(maps, biases, strict=True)]
    act = ACTIVATIONS[activation]
    expected = [act(maps[0]) * maps[1]] if gated else [act(one) for one in maps]
    if added:
        expected[0] = expected[0] + residual.double()
    outputs = [among_nan(torch.full_like(one, torch.nan, dtype=dtype)) for one in expected]
    more = {"activation": activation, "gated": gated, "residual": residual if added else None}
    linear.linear(x, weights, biases, outputs, **more)
    for output, wanted in zip(outputs, expected, strict=True):
        check_close(output, wanted)
        assert output._base.isnan().sum() == 128


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 1030])
def test_rms_norm(width, dtype) -> None:
    """x / sqrt(mean(x^2) + eps) * w in float64, of views too, and without weights."""
    memory, weight = random(7, width + 3, dtype=dtype) + 1, among_nan(random(width, dtype=dtype))
    dense = among_nan(memory[:6, :width])
    for x in (dense, dense[2:5], memory[:, 1 : width + 1], dense.view(3, 2, width), dense[0]):
        for factor, eps in ((weight, 1e-6), (weight, 0.5), (None, 1e-6)):
            scale = (x.double().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
            expected = x.double() * scale * (1 if factor is None else factor.double())
            check_close(norm.rms_norm(x, (width,), factor, eps), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 26])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "tokens"), [(1, 3, 3, 1), (3, 5, 1, 4)])
def test_rotation_of_halves(batch, heads, kv_heads, tokens, head_dim, dtype) -> None:
    """Each half turned by its own angles, of views of one projection, one text for all or each."""
    joined = random(batch, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype).transpose(1, 2)
    query, key, _ = joined.split([heads, kv_heads, kv_heads], dim=1)
    for texts in (1, batch):
        cos, sin = random(texts, tokens, 2 * head_dim, dtype=dtype).chunk(2, dim=-1)
        for pair in ((query, key), (among_nan(query), key.mT.contiguous().mT)):
            for got, x in zip(rotary.rotate_halves(*pair, cos, sin), pair, strict=True):
                other = torch.cat([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], dim=-1)
                turned = x.double() * cos.double()[:, None] + other.double() * sin.double()[:, None]
                assert got.is_contiguous()
                check_close(got, turned)


NAMES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2"]
SIZES = {name: FAMILIES[name] for name in NAMES} | {"gemma": {**GROUPED, "head_dim": 8}}
SIZES |= {"olmo2": GROUPED, "cohere": GROUPED}
CONFIG = KeyformerConfig.preset("keyformer", kv_cache=50, seed=0, backend="triton")


def small(name: str) -> nn.Module:
    """A small model of transformers, whose norms and biases are not trivial."""
    torch.manual_seed(0)
    if name in SIZES:
        config = AutoConfig.for_model(name, **{**SIZES[name], "num_hidden_layers": 1, "n_layer": 1})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    else:
        model = small_stock(name, layers=1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5)
    return enable_keyformer(model.to(DEVICE), CONFIG)


def after_prompt(model: nn.Module) -> dict:
    """The arguments of a step after a prompt of 20 tokens."""
    tokens = torch.arange(30, 51, device=DEVICE)[None]
    cache = KeyformerCache(model.config, CONFIG)
    cache.max_new_tokens = 9
    model(input_ids=tokens[:, :20], past_key_values=cache, use_cache=True)
    return {"input_ids": tokens[:, 20:], "past_key_values": cache, "use_cache": True}


def logits(model: nn.Module, arguments: dict) -> Tensor:
    return nn.Module.__call__(model, **copy.deepcopy(arguments)).logits


def own_functions(model: nn.Module) -> list:
    """What may stand in for a model's own."""
    names = vars(sys.modules[type(model).__module__])
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [*forwards, names.get("apply_rotary_pos_emb")]


@pytest.mark.parametrize("name", [*SIZES, "mpt", "gptj"])
def test_a_step_of_models(name, launches) -> None:
    """A step's logits are those outside, and all is as before, also once a step has raised."""
    model = small(name)
    arguments, before, few_rows = after_prompt(model), own_functions(model), FewRows(model)
    with pytest.raises(KeyError), few_rows:
        raise KeyError(F.linear(random(1, 32), random(2, 32)))
    assert own_functions(model) == before
    expected = logits(model, arguments)
    launches.clear()
    with few_rows:
        got = logits(model, arguments)
    assert (got - expected).norm() / expected.norm() < 1e-5
    assert own_functions(model) == before
    if name in ("llama", "mpt", "gptj"):
        assert len(launches) == 4 + 1


def test_another_thread_outside() -> None:
    """It computes with the same model what it would, while a step of this thread has begun."""
    model, x = small("llama"), random(1, 32)
    arguments = after_prompt(model)
    expected = logits(model, arguments), x @ model.lm_head.weight.T
    with ThreadPoolExecutor(1) as other, FewRows(model):
        waiting = F.linear(x, model.lm_head.weight)
        got = other.submit(torch.no_grad()(logits), model, arguments).result()
    assert torch.allclose(got, expected[0], atol=1e-4)
    assert torch.allclose(waiting, expected[1], atol=1e-5)


def test_threads_wait_for_each_other() -> None:
    """The second step begins when the first has ended, and the model is left as it was."""
    model, began, order = small("llama"), threading.Event(), []
    rotation = modeling_llama.apply_rotary_pos_emb

    def second() -> None:
        step = FewRows(model)
        began.set()
        with step:
            order.append("second")

    with ThreadPoolExecutor(1) as other:
        with FewRows(model):
            waiting = other.submit(second)
            assert not began.wait(0.2)  # it would look at what stands in for the model's own
            order.append("first")
        waiting.result()
    assert order == ["first", "second"]
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert not any("forward" in vars(module) for module in model.modules())


class Noted(Tensor):
    """A subclass like any."""


@torch.library.custom_op("few_rows::zero", mutates_args=("x",))
def zero(x: Tensor) -> None:
    x.mul_(0)


def check(function, *shapes: tuple[int, ...]) -> None:
    """What ``function`` gives of random tensors is what it gives without FewRows."""
    torch.manual_seed(0)
    tensors = [random(*shape) for shape in shapes]
    expected = function(*[tensor.clone() for tensor in tensors])
    with FewRows(nn.Module()):
        got = function(*tensors)
        read = got.clone()
    assert (type(got), got.dtype, got.shape) == (type(expected), expected.dtype, expected.shape)
    precision = {torch.float16: 1e-2, torch.float64: 1e-12}.get(got.dtype, 1e-5)
    for result in (read, got):
        assert torch.allclose(result.double(), expected.double(), rtol=precision, atol=precision)


CHANGES = {
    "add_": lambda x: x.add_(1),
    "copy_": lambda x: x.copy_(x.flip(0)),
    "setitem": lambda x: operator.setitem(x, 0, 7.0),
    "view": lambda x: x.view(-1)[1:3].zero_(),
    "relu": lambda x: F.relu(x, inplace=True),
    "out": lambda x: torch.mul(x, 3, out=x),
    "aten overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
    "set data": lambda x: setattr(x, "data", x.data + 1),
    "&=": lambda x: operator.iand(x.view(torch.int32), 0),
    "custom operator": zero,
    "embedding": lambda x: F.embedding(torch.zeros_like(x).long()[0], x, max_norm=0.1),  # FAILS
}


@pytest.mark.parametrize("changed", [0, 1], ids=["input", "weight"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_in_place_later(change, changed) -> None:
    """A result is that of its input and weight when linear was called."""
    check(lambda *xw: (F.linear(*xw), CHANGES[change](xw[changed]))[0], (4, 8), (6, 8))


ONES = torch.ones(4, 6, device=DEVICE)
READS = {
    "twice": lambda y: y * 1 + y.sum(),
    "added to itself": lambda y: y + y,
    "alpha": lambda y: torch.add(y, ONES, alpha=3) + ONES.add(y, alpha=2),
    "numbers added": lambda y: (y + 2) + (1 + y),
    "broadcast": lambda y: (y + ONES[0]) + (y + ONES[None]),
    "other dtypes": lambda y: (y + ONES.half()) + (y + ONES.long()),
    "silu in place": lambda y: F.silu(y, inplace=True) + y,
    "silu and itself": lambda y: F.silu(y) * y,
    "gelu of views": lambda y: F.gelu(y.view(2, 2, 6)).view(4, 6) + F.gelu(y.transpose(0, 1)).T,
    "as a weight": lambda y: F.linear(ONES, y) * 1,
    "as integers": lambda y: y.view(torch.int32) + ONES.int(),
    "a parameter": lambda y: nn.Parameter(y, requires_grad=False) * 1,
    "scripted": torch.jit.script(nn.ReLU()),
    "beside a sparse one": lambda y: ONES[:, :4].to_sparse() @ y,
    "vmap": lambda y: torch.vmap(lambda row: row * 2)(y),
    "alpha positional": lambda y: torch.add(y, 2, y),
    "a subclass": lambda y: y + ONES.as_subclass(Noted),
    "float64": lambda y: F.layer_norm(ONES.double().cumsum(0).cumsum(1), (6,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", READS)
def test_how_results_are_read(read) -> None:
    """Whatever reads a result finds it computed."""
    check(lambda x, w, b: READS[read](F.linear(x, w, b)), (4, 8), (6, 8), (6,))


def dropped(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    others = [(F.linear(x, w), torch.full_like(r, 2.0))[1] for _ in range(9)]
    return torch.stack(others) + F.linear(x, v)


def viewed(x: Tensor, w: Tensor, v: Tensor, r: Tensor, *dtype: torch.dtype) -> Tensor:
    result = F.linear(x, w)
    view = result.view(*dtype or (2, 2, 6)).transpose(0, 1)
    del result
    return view.clone().contiguous().view(torch.float32)


def gate_used_again(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    gate, up = F.silu(F.linear(x, w)), F.linear(x, v)
    return up * gate + gate * 3 + up


def autocast(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.float16):
        return F.linear(x, w)


FUNCTIONS = [
    *(dropped, viewed, gate_used_again, autocast),
    lambda *given: viewed(*given, torch.int32),
    lambda x, w, v, r: F.gelu(F.linear(x, w)) * F.linear(x + 1, v),
    lambda x, w, v, r: F.gelu(F.linear(x, w)) * BY_TANH(F.linear(x, v)),
    lambda x, w, v, r: F.silu(F.linear(x, w)) * F.linear(x, v[:1]),
    lambda x, w, v, r: F.silu(F.linear(x, w[:4])).T * F.linear(x, v[:4]),
    lambda x, w, v, r: (F.linear(x, w) + F.linear(x, v)).add(F.linear(x + 1, w)) + r,
    lambda x, w, v, r: F.linear(x, w, F.linear(x[0], v)) * 1,
    lambda x, w, v, r: F.linear(x, w, r[0, :1]) * 1,
    lambda x, w, v, r: torch.stack([F.linear(x, w * n, r[0]) for n in range(5)][::-1]),
    lambda x, w, v, r: F.linear(x.repeat(5, 1), w) + F.linear(x.repeat(4, 1), v)[0],
    lambda x, w, v, r: F.linear(r, w.T),
    lambda x, w, v, r: F.linear(x[:, ::2], v[:, ::2]) + F.linear(x[1:], w[1:])[0, 0],
    lambda x, w, v, r: F.linear(x[0], w) + r[1],
    lambda x, w, v, r: F.linear(x[:, :0], w[:, :0], r[0]) + F.linear(x[:1, :0], v[:, :0]),
    lambda x, w, v, r: F.linear(x, w[:0]) + F.linear(x[:0], w).sum(),
    lambda x, w, v, r: F.linear((x * 9).long().cpu(), (w * 9).long().cpu()),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_linear_maps(function) -> None:
    """What small functions give is what they give without."""
    check(function, (4, 8), (6, 8), (6, 8), (4, 6))


@pytest.mark.parametrize("shapes", [((4, 8), (6, 7)), ((4, 8), (6, 8), (5,))])
def test_shapes_that_do_not_fit(shapes) -> None:
    """An error, as torch has it."""
    with pytest.raises(RuntimeError), FewRows(nn.Module()):
        F.linear(*[random(*shape) for shape in shapes])


def test_what_is_launched(launches) -> None:
    """Nothing for what is dropped; siblings together; at the end what escapes."""
    x, w = random(4, 8), random(6, 8)
    weights = [w * n for n in range(4)]
    with FewRows(nn.Module()):
        assert F.silu(F.linear(x, w)).view(2, 2, 6).shape == (2, 2, 6)
        maps = [F.linear(x, weight) for weight in weights]
        assert launches == []
    assert launches == [3, 1]
    assert all(torch.allclose(got, x @ w.T * n, atol=1e-5) for n, got in enumerate(maps))


@pytest.mark.parametrize("is_int8", [False, True])
def test_weights_of_subclasses(is_int8, launches) -> None:
    """They compute by themselves."""
    layer, x = nn.Linear(32, 16, device=DEVICE), random(2, 32)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Noted), requires_grad=False)
    if is_int8:
        from torchao import quantization  # slow to import

        layer = nn.Linear(32, 16, device=DEVICE)
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    expected = layer(x)
    with FewRows(layer):
        assert torch.equal(layer(x), expected)
    assert launches == []


def module(forward, weight: float = 1.5, source: str = __name__) -> nn.Module:
    made = type("RMSNorm", (nn.Module,), {"forward": forward, "__module__": source})()
    made.weight, made.eps = nn.Parameter(torch.full((8,), weight, device=DEVICE)), 1e-6
    return made


def centered(self: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, (8,), self.weight, None, self.eps)


def llama_norm(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * F.rms_norm(x, (8,), eps=self.eps)


def added(self: nn.Module, x: Tensor, residual: Tensor | float = 0.0) -> Tensor:
    return F.rms_norm(x + residual, (8,), self.weight, self.eps)


NORMS = {
    "centered": (centered, 1.5, 1, __name__),
    "small": (centered, 0.004, 1, __name__),
    "two": (added, 1.5, 2, __name__),
    "required": (lambda self, x, y: x + y, 1.5, 2, __name__),
    "mixed": (llama_norm, 1.5, 1, __name__),
    "elsewhere": (lambda self, x: x * 2, 1.5, 1, "nowhere"),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_kinds(name) -> None:
    """What the kernel does not compute, or not in that dtype, is left alone."""
    forward, weight, count, source = NORMS[name]
    layer = module(forward, weight, source)
    x = [random(3, 8, dtype=torch.float16 if name == "mixed" else torch.float32)] * count
    expected = layer(*x)
    with FewRows(layer):
        got = layer(*x)
    assert got.dtype == expected.dtype
    assert torch.allclose(got, expected, rtol=2e-3)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, factor: float = 1.0) -> tuple:
    cos, sin = cos[:, None] * factor, sin[:, None] * factor
    return tuple(x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin for x in (q, k))


@pytest.mark.parametrize("rotate", [turned, lambda q, k, cos, sin, n: turned(q, k, cos, sin, n)])
def test_rotations_that_take_more(rotate, monkeypatch) -> None:
    """One is left to itself where it is told what the kernel does not know."""
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", rotate)
    (query, key), cos = random(2, 1, 2, 3, 8), random(1, 3, 8)
    more = {"factor" if rotate is turned else "n": 3.0}
    expected = rotate(query, key, cos, cos, **more)
    with FewRows(module(centered)):
        got = globals()["apply_rotary_pos_emb"](query, key, cos, cos, **more)
    assert all(map(torch.allclose, got, expected))


def test_a_step_counts_its_place_on_the_device(monkeypatch) -> None:
    """Also under method full, where the host knows it, which a graph would take for a constant."""
    model = small("llama")
    told = []
    stock = stock_class(type(model.get_decoder()))
    forward = stock.forward

    @functools.wraps(forward)
    def noted(*args, **more):
        told.append(more.get("position_ids"))
        return forward(*args, **more)

    monkeypatch.setattr(stock, "forward", noted)
    tokens = torch.randint(1, 61, (2, 7), device=DEVICE)
    cache = KeyformerCache(model.config, KeyformerConfig.preset("full", backend="triton"))
    cache.max_new_tokens = 20
    for fed in (tokens, tokens[:, :1], tokens[:, :1]):
        model(input_ids=fed, past_key_values=cache, use_cache=True)
    assert told[0] is None  # a prompt is not replayed: transformers counts
    assert [places.tolist() for places in told[1:]] == [[[7], [7]], [[8], [8]]]
    assert not model.get_decoder().counts_alone(cache)
    padded = torch.tensor([[0, 1], [1, 1]], device=DEVICE)
    cache = KeyformerCache(model.config, cache.config)
    cache.max_new_tokens = 20
    model(input_ids=tokens[:, :2], attention_mask=padded, past_key_values=cache, use_cache=True)
    assert model.get_decoder().counts_alone(cache)  # padding counts there, so it is run
