"""The model for lm-eval against lm-eval's own hf model and against texts fed by hand."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.metadata import distributions, entry_points
from pathlib import Path

import pytest
import torch
from conftest import Forked, forked_ranks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from lm_eval.models.huggingface import HFLM
from originals import write_original

import keyformer_lm_eval
from keyformer import InputError, KeyformerCache, KeyformerConfig, load_model
from keyformer.quantize import weight_bytes
from keyformer_evaluation.records.identity import noise_id
from keyformer_lm_eval.model import KeyformerLM

WORDS = ["the", "key", "tokens", "and", "recent", "ones", "the", "key", "recent", "stay"]


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
        *PAIRS[::3],
        PAIRS[3],
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
    for chunk in (None, 7):
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
    cache = KeyformerCache(lm.model.config, config, [noise_id(prompt)])
    logits = lm.model(torch.tensor([prompt]), past_key_values=cache).logits[0, -1:]
    total, greedy = 0.0, True
    for token in rest:
        budget = max(1, int(len(prompt) * config.kv_cache / 100))
        assert cache.layers[0].positions.shape[-1] == budget
        total += float(logits.log_softmax(-1)[0, token])
        greedy &= int(logits.argmax()) == token
        logits = lm.model(torch.tensor([[token]]), past_key_values=cache).logits[0]
    return total, greedy


@pytest.mark.parametrize(
    ("method", "chunk"),
    [("window", 4), ("h2o", 1), *(("keyformer", chunk) for chunk in (None, 1, 4))],
)
def test_continuations_see_the_evicted_cache(mpt, method: str, chunk) -> None:
    """One request at a time, as fed by hand, with its context's noise."""
    lm = model(mpt, method, kv_cache=40, recent=50, prefill_chunk=chunk)
    pairs = PAIRS[::5]  # each context, each end
    expected = [by_hand(lm, lm.keyformer_config, *pair) for pair in pairs]
    check(lm.loglikelihood(ask("loglikelihood", *pairs)), expected)
    whole = model(mpt).loglikelihood(ask("loglikelihood", *pairs))
    assert max(abs(a - b) for (a, _), (b, _) in zip(whole, expected, strict=True)) > 0.01


@pytest.mark.parametrize("method", ["full", "keyformer"])
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
@pytest.mark.parametrize(
    ("method", "chunk"), [("window", None), ("h2o", 4), ("keyformer", None), ("keyformer", 4)]
)
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


GENERATED = {"max_gen_toks": 5, "until": [], "do_sample": False}
KINDS = {
    "loglikelihood": PAIRS,
    "loglikelihood_rolling": [(words(i, 3 + 4 * i),) for i in range(5)],
    "generate_until": [(context, GENERATED) for context in CONTEXTS],
}


def fed(lm: KeyformerLM, most_rows: int = 10**9) -> list[tuple[int, int]]:
    """Shapes that are fed from now on; what has more rows does not fit into memory."""
    shapes = []

    def note(_, args, kwargs) -> None:
        shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))
        if shapes[-1][0] > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    lm.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("kind", KINDS)
def test_b12_auto_feeds_nothing_but_the_requests(mpt, kind: str) -> None:
    """No trial at max_length, nor before any later call; hf's numbers."""
    requests = ask(kind, *KINDS[kind][:3])
    lm, fixed = model(mpt, batch_size="auto"), model(mpt, batch_size=64)
    lm.resume = False  # nothing answers for it the second time
    shapes, expected = fed(lm), fed(fixed)
    results = [getattr(one, kind)(requests) for one in (lm, lm, fixed)]
    assert shapes == 2 * expected
    assert results[0] == results[1] == results[2]
    assert lm.batch_size == "auto" and lm.batch_sizes == {0: 64}


@pytest.mark.parametrize("kind", KINDS)
def test_b12_auto_is_what_fits_of_the_longest_once(mpt, kind: str) -> None:
    """Halved while memory runs out and kept, also for the requests of another kind."""
    requests = ask(kind, *KINDS[kind])
    lm = model(mpt, "h2o", kv_cache=40, batch_size="auto", max_batch_size=16)
    lm.resume = False
    shapes = fed(lm, most_rows=3)
    got = getattr(lm, kind)(requests)
    refused = [rows for rows, _ in shapes if rows > 3]
    assert shapes[: len(refused)] == [shape for shape in shapes if shape[0] > 3] and refused
    assert lm.batch_sizes == {0: 2}
    shapes.clear()
    assert getattr(lm, kind)(requests) == got
    lm.loglikelihood(ask("loglikelihood", *PAIRS[::3]))
    assert max(rows for rows, _ in shapes) == 2
    assert got == getattr(model(mpt, "h2o", kv_cache=40, batch_size=2), kind)(requests)


def test_b12_auto_n_finds_it_n_times(mpt) -> None:
    """Shorter requests may come in larger batches; where not one fits, an error says so."""
    texts = ask("loglikelihood_rolling", *[(words(i, 3 + 4 * i),) for i in range(8)])
    lm = model(mpt, batch_size="auto:4", max_batch_size=4)
    shapes = fed(lm, most_rows=3)
    got = lm.loglikelihood_rolling(texts)
    assert [rows for rows, _ in shapes] == [4, 2, 4, 2, 4, 2, 2]  # the last two are no more
    assert lm.batch_sizes == {0: 2, 1: 2, 2: 2, 3: 4}
    assert got == pytest.approx(model(mpt).loglikelihood_rolling(texts), abs=1e-3)
    lm = model(mpt, batch_size="auto")
    fed(lm, most_rows=0)
    with pytest.raises(InputError, match="one sequence is too much for the memory: CUDA out of"):
        lm.loglikelihood_rolling(texts)


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


def test_b1_quantize_is_a_model_argument(mpt) -> None:
    given = f"pretrained={mpt},method=full,quantize=int8,dtype=float32"
    lm = KeyformerLM.create_from_arg_string(given, {"device": "cpu"})
    assert weight_bytes(lm.model) < weight_bytes(model(mpt).model)
    (total, _), (plain, _) = (
        one.loglikelihood(ask("loglikelihood", PAIRS[0]))[0] for one in (lm, model(mpt))
    )
    prompt, rest = lm._encode_pair(*PAIRS[0])
    by_hand, _ = load_model(mpt, dtype="float32", device="cpu", quantize="int8")
    with torch.no_grad():
        logits = by_hand(torch.tensor([prompt + rest]), use_cache=False).logits[0, :-1]
    of_rest = logits.log_softmax(-1)[-len(rest) :].gather(1, torch.tensor(rest)[:, None])
    expected = float(of_rest.sum())
    assert total == pytest.approx(expected, abs=1e-3) and abs(total - plain) > 0.01


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"quantize": "int3"}, "quantize must be one of bnb-8bit, bnb-4bit, int8, got 'int3'"),
        ({"method": "snapkv"}, "snapkv"),
        ({"kv_cach": 50}, "unknown setting 'kv_cach'"),
        ({"kv_cache": 0}, r"kv_cache must be a percentage in \(0, 100\], got 0"),
        ({"dtype": "float8"}, "float8"),
        ({"device": "toaster"}, "toaster"),
        ({"batch_size": 0}, "batch_size must be a number, auto or auto:N, got 0"),
        ({"batch_size": "autos"}, "batch_size"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"pretrained": "nowhere/model"}, "nowhere/model"),
    ],
)
def test_bad_arguments(mpt, arguments, says: str) -> None:
    with pytest.raises(InputError, match=says):
        KeyformerLM(**{"pretrained": mpt, "device": "cpu", **arguments})


@pytest.mark.parametrize("device", [None, "cuda:99", "hpu"])
def test_b18_a_device_that_is_not_there_is_a_gpu_or_the_cpu(mpt, caplog, device) -> None:
    """As hf takes it; lm-eval's command says cuda:0 wherever it runs."""
    lm = KeyformerLM(mpt, device=device, dtype="float32")
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    notes = [record.getMessage() for record in caplog.records if "no device" in record.msg]
    assert notes == (
        [f"there is no device {device} here, the model is put on {lm.device}"] * bool(device)
    )


PLUGIN, MAIN = (
    str(Path(keyformer_lm_eval.__file__).with_name(name)) for name in ("plugin.yaml", "__main__.py")
)


NOT_IMPORTED = """
import sys
for name in list(sys.modules):
    if name.partition(".")[0] in ("lm_eval", "keyformer_lm_eval"):
        del sys.modules[name]
"""
"""A script that has nothing of lm-eval yet, and nothing that registers with it."""


OWN_TASKS_ALONE = """
import runpy, sys
from lm_eval.tasks import TaskManager
init = TaskManager.__init__
TaskManager.__init__ = lambda *given, **named: init(*given, **named | {"include_defaults": False})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script without lm-eval's own tasks: thousands of files that each process would read."""


def evaluated(folder: Path, command: str, path: str, *flags: str) -> tuple[dict, str, str]:
    """lm-eval's results from a command on three questions, and what it printed."""
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(
        "task: two_ends\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'd.jsonl'}}}}}\n"
        "doc_to_text: text\ndoc_to_choice: ends\ndoc_to_target: 0\n"
    )
    (folder / "d.jsonl").write_text('{"text": "the key", "ends": ["tokens", "others"]}\n' * 3)
    script = str(Path(sys.executable).with_name(command))
    named = ["--model", "keyformer", "--model_args", f"pretrained={path}", *flags]
    tasks = ["--include_path", str(folder), "--output_path", str(folder / "out")]
    anew = NOT_IMPORTED if command == "lm_eval" else ""
    (folder / "alone.py").write_text(anew + OWN_TASKS_ALONE)
    whole = [str(folder / "alone.py"), script, *named, *tasks]
    code, printed, notes = Forked(whole, folder / "says").wait()
    assert code == 0, notes
    (written,) = (folder / "out").rglob("results_*.json")
    return json.loads(written.read_text())["results"], printed, notes


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("lm_eval", ["--tasks", "two_ends", PLUGIN, "--device", "cpu"]),
        ("keyformer-lm-eval", ["--tasks", "two_ends"]),
    ],
)
def test_a18_b18_commands_find_the_model_and_a_device(mpt, tmp_path, command, flags) -> None:
    """lm-eval's own, where the tasks name the plugin, and this project's without.

    Without --device lm-eval says it is cuda:0.
    """
    results, printed, notes = evaluated(tmp_path, command, mpt, *flags)
    assert any("two_ends" in line for line in printed.splitlines())
    assert [name for name, measured in results.items() if "acc,none" in measured] == ["two_ends"]
    note = "there is no device cuda:0 here, the model is put on cpu"
    assert notes.count(note) == ("--device" not in flags and not torch.cuda.is_available())


TASKS = """
task: {kind}_task
output_type: {kind}
test_split: test
fewshot_split: test
num_fewshot: {shots}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
metric_list: [{{metric: {metric}}}]
{more}
"""


def test_processes_share_the_requests_and_give_what_one_gives(mpt, tmp_path) -> None:
    """Five documents on two processes, each kind of requests, examples drawn: alike to the end."""
    data = tmp_path / "data.jsonl"
    documents = [
        {"text": words(i, 5 + 3 * i), "ends": [words(i, 2), "key"], "end": "key"} for i in range(5)
    ]
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    kinds = {
        "multiple_choice": (2, 0, "acc", "doc_to_choice: ends"),
        "loglikelihood_rolling": (0, '"{{text}}"', "bits_per_byte", ""),
        "generate_until": (2, "end", "exact_match", "generation_kwargs: {max_gen_toks: 5}"),
    }
    for kind, (shots, target, metric, more) in kinds.items():
        task = TASKS.format(
            kind=kind, shots=shots, target=target, metric=metric, more=more, data=data
        )
        (tmp_path / f"{kind}.yaml").write_text(task)
    flags = ["--model_args", f"pretrained={mpt},kv_cache=40", "--include_path", str(tmp_path)]
    flags += [
        "--model",
        "keyformer",
        "--log_samples",
        "--tasks",
        *(f"{kind}_task" for kind in kinds),
    ]
    runs = []
    (tmp_path / "alone.py").write_text(OWN_TASKS_ALONE)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [
            str(tmp_path / "alone.py"),
            MAIN,
            *flags,
            "--output_path",
            str(out),
            "--device",
            "cpu",
        ]
        ended = forked_ranks(command, tmp_path / "says", processes)
        assert [code for code, _, _ in ended] == [0] * processes, ended
        (written,) = out.rglob("results_*.json")
        samples = {path.name.split("_task")[0]: path.read_text() for path in out.rglob("samples_*")}
        assert [text.count("\n") for text in samples.values()] == [5, 5, 5]
        printed = "".join(out for _, out, _ in ended)
        runs.append((json.loads(written.read_text())["results"], samples, printed))
    assert runs[0] == runs[1]


def test_a18_names_of_the_commands() -> None:
    """Both of lm-eval's run one function, as ``python -m lm_eval`` does; so do this project's."""
    scripts = {one.name: one.value for one in entry_points(group="console_scripts")}
    assert scripts["lm_eval"] == scripts["lm-eval"] == "lm_eval.__main__:cli_evaluate"
    assert scripts["keyformer-lm-eval"] == "keyformer_lm_eval.__main__:main"


def test_a18_importing_torch_runs_nothing_of_this_project(tmp_path) -> None:
    code = "import sys, torch\nprint(*sys.modules)"
    kept = {k: v for k, v in os.environ.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=kept
    )
    assert ran.returncode == 0, ran.stderr
    loaded = {name.partition(".")[0] for name in ran.stdout.split()}
    assert "torch" in loaded
    assert not {name for name in loaded if "keyformer" in name or name in ("lm_eval", "tiny")}


def test_a18_no_metadata_declares_a_plugin_of_torch() -> None:
    """Of any copy of it that is found: that of an earlier install goes with a new one."""
    found = list(distributions(name="keyformer"))
    assert found
    groups = {one.group for metadata in found for one in metadata.entry_points}
    assert groups == {"console_scripts", "lm_eval.models"}


def test_a18_the_entry_point_of_lm_eval_gives_the_model(tmp_path) -> None:
    """As releases that read it keep it; being registered already, it is left alone."""
    code = (
        NOT_IMPORTED + "from importlib.metadata import entry_points\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "import lm_eval.models\n"
        "point = entry_points(group='lm_eval.models')['keyformer']\n"
        "model_registry.register('keyformer', target=point)\n"
        "import keyformer_lm_eval\nkeyformer_lm_eval.register()\n"
        "print(get_model('keyformer').__name__, get_model('hf').__name__)"
    )
    (tmp_path / "registers.py").write_text(code)
    ended, printed, errors = Forked([str(tmp_path / "registers.py")], tmp_path / "says").wait()
    assert ended == 0, errors
    assert printed.split() == ["KeyformerLM", "HFLM"]


def test_a18_importing_the_model_registers_it_beside_lm_evals_own() -> None:
    assert get_model("keyformer") is KeyformerLM and get_model("hf") is HFLM
    assert "vllm" in model_registry
