"""The model for lm-eval against lm-eval's own hf model and against texts fed by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from originals import write_original

from keyformer import InputError, KeyformerCache, KeyformerConfig
from keyformer_lm_eval.model import KeyformerLM

WORDS = ["the", "key", "tokens", "and", "recent", "ones", "stay", "while", "others", "leave"]


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(count))


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    """Requests as tasks make them."""
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


CONTEXTS = [words(0, 4), words(3, 11), words(8, 2), words(1, 7)]
ENDS = [" the recent tokens stay", " the", " key", " and the key tokens"]
PAIRS = list(itertools.product(CONTEXTS, ENDS))


@pytest.fixture(scope="module")
def path(arch, tmp_path_factory) -> str:
    return str(write_original(tmp_path_factory.mktemp("lm_eval") / arch, arch, "safetensors"))


@pytest.fixture(scope="module")
def hf(path) -> HFLM:
    return HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def mpt(tmp_path_factory) -> str:
    """Where eviction is looked at; the cache's own tests have every architecture."""
    return str(write_original(tmp_path_factory.mktemp("lm_eval") / "mpt", "mpt", "safetensors"))


def model(path: str, method: str = "full", **settings) -> KeyformerLM:
    return KeyformerLM(path, method, **{"dtype": "float32", "device": "cpu", **settings})


def check(got: list, expected: list) -> None:
    """Log-probabilities agree, and flags are the same."""
    assert len(got) == len(expected)
    for (total, greedy), (its_total, its_greedy) in zip(got, expected, strict=True):
        assert total == pytest.approx(its_total, rel=1e-5, abs=1e-4)
        assert greedy is its_greedy


def test_full_is_lm_evals_own_model(path, hf) -> None:
    """Numbers and flags in the requests' order: shared, repeated, empty and long contexts too."""
    requests = ask(
        "loglikelihood",
        *PAIRS,
        PAIRS[5],
        ("", "the recent ones"),
        ("", "leave"),
        (words(2, 6) + "  ", "stay"),
        (words(4, 15), words(5, 20)),
    )
    expected = hf.loglikelihood(requests)
    for settings in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 4, "prefill_chunk": 5}):
        got = model(path, **settings).loglikelihood(requests)
        check(got, expected)
        assert all(type(total) is float and type(flag) is bool for total, flag in got)


def test_full_knows_greedy_continuations_as_hf_does(path, hf) -> None:
    prompt = hf.tok_encode(CONTEXTS[1])
    ids = torch.tensor([prompt])
    best = hf.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    best = best[0, len(prompt) :].tolist()
    others = [[*best[:-1], best[-1] + 1], [best[0] + 1, *best[1:]]]
    requests = [(None, prompt, ids) for ids in (best, *others, best[:1], [best[0] + 1])]
    expected = hf._loglikelihood_tokens(requests)
    assert [flag for _, flag in expected] == [True, False, False, True, False]
    check(model(path, batch_size=3)._loglikelihood_tokens(requests), expected)


def test_full_cuts_long_requests_as_hf_does(path) -> None:
    requests = ask("loglikelihood", *PAIRS, (words(4, 20), " leave"))
    settings = {"device": "cpu", "dtype": "float32", "max_length": 20, "batch_size": 4}
    check(
        model(path, **settings).loglikelihood(requests),
        HFLM(pretrained=path, **settings).loglikelihood(requests),
    )
    with pytest.raises(InputError, match="longer than max_length 20"):
        model(path, **settings).loglikelihood(ask("loglikelihood", ("the", words(4, 60))))


@pytest.mark.parametrize("max_length", [None, 20])
def test_full_rolls_as_hf_does(path, max_length) -> None:
    requests = ask("loglikelihood_rolling", *[(words(i, 3 + 5 * i),) for i in range(4)])
    settings = {"device": "cpu", "dtype": "float32", "max_length": max_length, "batch_size": 4}
    expected = HFLM(pretrained=path, **settings).loglikelihood_rolling(requests)
    for chunk in (None, 1, 7):
        got = model(path, **settings, prefill_chunk=chunk).loglikelihood_rolling(requests)
        assert got == pytest.approx(expected, abs=1e-3)


def test_full_generates_as_hf_does(path, hf) -> None:
    options = {"max_gen_toks": 12, "until": ["tokens"], "do_sample": False}
    requests = ask("generate_until", *[(context, options) for context in CONTEXTS])
    assert model(path, batch_size=2).generate_until(requests) == hf.generate_until(requests)


@torch.no_grad()
def by_hand(lm: KeyformerLM, config: KeyformerConfig, context: str, end: str) -> tuple:
    """The prompt in one call, then each token in one, with the cache's budget checked."""
    prompt, rest = lm._encode_pair(context, end)
    cache = KeyformerCache(lm.model.config, config)
    logits = lm.model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1:]
    total, greedy = 0.0, True
    for token in rest:
        budget = max(1, int(len(prompt) * config.kv_cache / 100))
        assert cache.layers[0].positions.shape[-1] == budget
        total += float(logits.log_softmax(-1)[0, token])
        greedy &= int(logits.argmax()) == token
        logits = lm.model(torch.tensor([[token]]), past_key_values=cache).logits[0]
    return total, greedy


@pytest.mark.parametrize("method", ["window", "h2o", "keyformer"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_continuations_see_the_evicted_cache(mpt, method: str, chunk) -> None:
    """One request at a time, as fed by hand: noise is that of a batch of one."""
    lm = model(mpt, method, kv_cache=40, recent=50, prefill_chunk=chunk)
    pairs = PAIRS[::3]
    expected = [by_hand(lm, lm.keyformer_config, *pair) for pair in pairs]
    check(lm.loglikelihood(ask("loglikelihood", *pairs)), expected)
    whole = model(mpt).loglikelihood(ask("loglikelihood", *pairs))
    assert max(abs(a - b) for (a, _), (b, _) in zip(whole, expected, strict=True)) > 0.01


@pytest.mark.parametrize("method", ["full", "h2o", "keyformer"])
def test_sharing_a_context_changes_no_number(mpt, monkeypatch, method: str) -> None:
    """A prompt for each context instead of each request, and what each request gives alone."""
    lm = model(mpt, method, kv_cache=40)
    prompts = []
    prefill = lm._prefill
    monkeypatch.setattr(lm, "_prefill", lambda some: (prompts.extend(some), prefill(some))[1])
    requests = ask("loglikelihood", *PAIRS)
    alone = [lm.loglikelihood([request])[0] for request in requests]
    assert len(prompts) == len(PAIRS)
    prompts.clear()
    check(lm.loglikelihood(requests), alone)
    assert len(prompts) == len(CONTEXTS)


def test_batches_give_each_request_its_own_result(mpt) -> None:
    """Budgets of each sequence; rows of other lengths, and rows that end, change nothing."""
    one_by_one = model(mpt, "h2o", kv_cache=40).loglikelihood(ask("loglikelihood", *PAIRS))
    for size in (3, 64):
        lm = model(mpt, "h2o", kv_cache=40, batch_size=size)
        check(lm.loglikelihood(ask("loglikelihood", *PAIRS)), one_by_one)


@torch.no_grad()
@pytest.mark.parametrize("method", ["window", "h2o", "keyformer"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_rolling_texts_flow_through_the_cache(mpt, method: str, chunk) -> None:
    """As one prompt in chunks, of one token unless said otherwise; alone and in a batch."""
    texts = [words(i, 3 + 4 * i) for i in range(3)]
    settings = {"kv_cache": 30, "prefill_chunk": chunk, "noise": "none"}
    got = model(mpt, method, **settings, batch_size=3).loglikelihood_rolling(
        ask("loglikelihood_rolling", *[(text,) for text in texts])
    )
    lm = model(mpt, method, **settings)
    config = KeyformerConfig.preset(method, **{**settings, "prefill_chunk": chunk or 1}, seed=0)
    for text, total in zip(texts, got, strict=True):
        ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(text)]])
        cache = KeyformerCache(lm.model.config, config)
        logits = lm.model(ids[:, :-1], past_key_values=cache).logits.log_softmax(-1)
        expected = logits.gather(-1, ids[:, 1:, None]).sum()
        assert total == pytest.approx(float(expected), abs=1e-3)
        assert cache.layers[0].positions.shape[-1] == int((ids.shape[1] - 1) * 0.3)


def test_generation_evicts(mpt) -> None:
    """Texts are those of generate with the same method."""
    lm = model(mpt, "h2o", kv_cache=40, batch_size=2)
    options = {"max_gen_toks": 9, "until": [], "do_sample": False}
    got = lm.generate_until(ask("generate_until", *[(one, options) for one in CONTEXTS]))
    for context, text in zip(CONTEXTS, got, strict=True):
        ids = torch.tensor([lm.tok_encode(context)])
        out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
        assert text == lm.tok_decode(out[0, ids.shape[1] :])


def test_arguments_come_as_lm_eval_parses_them(mpt) -> None:
    lm = KeyformerLM.create_from_arg_string(
        f"pretrained={mpt},method=h2o,kv_cache=35.5,prefill_chunk=8,dtype=bfloat16",
        {"batch_size": "4", "device": "cpu", "max_batch_size": None},
    )
    assert lm.keyformer_config == KeyformerConfig.preset(
        "h2o", kv_cache=35.5, prefill_chunk=8, seed=0
    )
    assert lm.batch_size == 4 and lm.model.dtype == torch.bfloat16
    assert lm.pretrained == mpt and lm.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "snapkv"}, "snapkv"),
        ({"kv_cach": 50}, "unknown setting 'kv_cach'"),
        ({"kv_cache": 0}, r"kv_cache must be a percentage in \(0, 100\], got 0"),
        ({"dtype": "float8"}, "float8"),
        ({"device": "toaster"}, "toaster"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"pretrained": "nowhere/model"}, "nowhere/model"),
    ],
)
def test_bad_arguments(mpt, arguments, says: str) -> None:
    with pytest.raises(InputError, match=says):
        KeyformerLM(**{"pretrained": mpt, "device": "cpu", **arguments})


def test_the_command_finds_the_model(mpt, tmp_path) -> None:
    """lm-eval's own command, which still finds its own models; other programs import nothing."""
    (tmp_path / "task.yaml").write_text(
        "task: two_ends\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        "doc_to_text: text\ndoc_to_choice: ends\ndoc_to_target: 0\n"
    )
    (tmp_path / "d.jsonl").write_text('{"text": "the key", "ends": ["tokens", "others"]}\n' * 3)
    command = (
        "import sys\nfrom lm_eval.__main__ import cli_evaluate\n"
        f"sys.argv = ['lm_eval', '--model', 'keyformer', '--model_args', 'pretrained={mpt}',"
        f" '--tasks', 'two_ends', '--include_path', '{tmp_path}', '--device', 'cpu']\n"
        "cli_evaluate()\n"
        "from lm_eval.api.registry import get_model\nprint(get_model('hf').__name__)"
    )
    other = "import sys, torch; print('transformers' in sys.modules, 'lm_eval' in sys.modules)"
    ran = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        for code in (command, other)
    ]
    assert ran[0].returncode == 0, ran[0].stderr
    *table, last = ran[0].stdout.splitlines()
    assert any("two_ends" in line for line in table)
    assert last == "HFLM"
    assert ran[1].stdout.split() == ["False", "False"]
