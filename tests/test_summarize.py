"""summarize.py and compare.py from flags to files, on a small random checkpoint."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from originals import ORIGINALS, write_original
from transformers import AutoTokenizer, MptForCausalLM, PreTrainedTokenizerBase

from keyformer import InputError, KeyformerCache, load_model
from keyformer.config import METHODS
from keyformer_evaluation.tasks import data
from keyformer_evaluation.tasks.data import conversation, user
from keyformer_evaluation.tasks.flags import check_task_flags, method_config, run_main
from keyformer_evaluation.tasks.rouge import METRICS
from keyformer_evaluation.tasks.run import task_parser

summarize = script("summarization", "summarize")
compare = script("summarization", "compare")


@pytest.fixture(scope="module")
def model_path(arch, tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("summarize") / arch, arch, "safetensors")


@pytest.fixture(scope="module")
def mpt_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("summarize") / "mpt", "mpt", "safetensors")


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "eval.json"
    words = ["the", "key", "tokens", "and", "recent", "ones", "stay", "while", "others", "leave"]
    items = [
        {
            "instruction": "Sum up.",
            "input": " ".join(words[(i + j * j) % len(words)] for j in range(8 + 11 * i)),
            "output": "the key tokens. the recent tokens.",
        }
        for i in range(5)
    ]
    path.write_text(json.dumps(items))
    return path


@pytest.fixture
def run(model_path, dataset_path, tmp_path, monkeypatch):
    """A function that runs summarize.py with more flags; its scores and summaries."""

    def run_with(*flags: str):
        out = {"save_path": tmp_path / "s.txt", "score_path": tmp_path / "s.json"}
        argv = ["--model_path", str(model_path), "--dataset_path", str(dataset_path)]
        argv += [part for name, path in out.items() for part in (f"--{name}", str(path))]
        argv += ["--device", "cpu", "--max_new_tokens", "5", *flags]
        summarize.main(argv)
        scores = json.loads(out["score_path"].read_text())
        return scores, out["save_path"].read_text().splitlines()

    return run_with


@pytest.fixture
def caches(monkeypatch) -> list[KeyformerCache]:
    """Every cache that a run makes."""
    made = []
    init = KeyformerCache.__init__

    def keep(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(KeyformerCache, "__init__", keep)
    return made


BATCHES = [["--bs", "1"], ["--bs", "4", "--beam", "4", "--early_stopping"]]
SIZES = ["20", "90"]
ARCHS = [*ORIGINALS]


@pytest.mark.parametrize(
    ("arch", "method", "batch", "kv_cache"),
    [
        (ARCHS[(number + more) % 3], method, batch, SIZES[(number + more) % 2])
        for number, method in enumerate(METHODS)
        for more, batch in enumerate(BATCHES)
    ],
    scope="session",
)  # every pair of two of them, but for methods and models, of which each method has two
def test_every_method_keeps_its_budget(run, caches, method, batch, kv_cache) -> None:
    scores, lines = run("--attention", method, "--kv_cache", kv_cache, *batch)
    assert len(lines) == 5
    assert scores["method"] == method
    assert scores["gen_num"] == 5 and scores["gen_len"] >= 0
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert 0 <= scores[name] <= 100
    for name in ("command", "config", "versions", "device", "commit", "seconds"):
        assert name in scores
    assert scores["peak_memory_bytes"] > 0 and scores["tokens_per_second"] > 0
    assert scores["kv_bytes_prompt"] <= scores["kv_bytes_end"]
    if method != "full":
        assert scores["kv_bytes_prompt"] == scores["kv_bytes_end"]
    for cache in caches:
        for layer in cache.layers:
            budgets = cache.text.budget[:, None].expand(-1, layer.positions.shape[1])
            filled = (layer.positions >= 0).sum(-1)
            seen = layer.positions.amax((1, 2)) + 1
            assert torch.equal(filled, torch.minimum(budgets, seen[:, None]))


def test_half_the_cache_holds_half_the_bytes(run) -> None:
    full, _ = run("--attention", "full", "--min_gen_length", "5")
    half, _ = run("--keyformer", "--kv_cache", "50", "--min_gen_length", "5")
    assert half["method"] == "keyformer"
    assert half["kv_bytes_end"] < 0.5 * full["kv_bytes_end"]


def test_flags_reach_generation(run, monkeypatch) -> None:
    scores, lines = run(
        *("--num_return_sequences", "2", "--do_sample", "--temperature", "0.7"),
        *("--top_k", "9", "--top_p", "0.9", "--output_sequence_scores", "--n_obs", "3"),
        *("--no_repeat_ngram_size", "2", "--repetition_penalty", "1.2", "--min_gen_length", "5"),
    )
    assert len(lines) == 6 and scores["gen_num"] == 6
    assert [len(several) for several in scores["sequence_scores"]] == [2, 2, 2]
    assert all(value < 0 for several in scores["sequence_scores"] for value in several)
    assert scores["gen_tokens"] == 30
    again, _ = run("--max_gen_length", "1", "--min_gen_length", "1")
    assert again["gen_tokens"] == 5  # a prompt at its limit still gives one token
    _, lines = run("--no-output_summaries_only", "--include_special_tokens")
    assert all("### Response:" in line for line in lines)


def test_seed_decides_sampling_and_noise(run) -> None:
    flags = ("--n_obs", "2", "--do_sample", "--keyformer", "--kv_cache", "40", "--seed")
    assert run(*flags, "1")[1] == run(*flags, "1")[1]
    assert run(*flags, "1")[1] != run(*flags, "2")[1]


def test_eos_token_ends_a_summary(run, model_path) -> None:
    length = ["--bs", "5", "--max_new_tokens", "12"]
    scores, lines = run(*length, "--min_gen_length", "12", "--include_special_tokens")
    assert scores["gen_tokens"] == 60
    written = AutoTokenizer.from_pretrained(model_path)(lines)["input_ids"]
    for token in dict.fromkeys(token for line in written for token in line):
        ended, _ = run(*length, "--eos_token_id", str(token))
        if ended["gen_tokens"] < 60:
            return
    raise AssertionError("no token ended any summary")


@pytest.mark.parametrize(
    ("arch", "flags"),
    [
        ("mpt", ["--max_tokenizer_length", "300"]),
        ("gptj", ["--no_truncation"]),
        ("gptj", ["--padding", "max_length", "--max_tokenizer_length", "600", "--bs", "3"]),
        ("cerebras", ["--padding_side", "right", "--bs", "3"]),
    ],
    scope="session",
)
def test_prompt_lengths(run, caches, flags) -> None:
    run(*flags, "--keyformer", "--kv_cache", "50")
    seen = [cache.get_seq_length() - 4 for cache in caches]
    if "300" in flags:
        assert max(seen) <= 300
    if "600" in flags:
        assert set(seen) == {600}
    assert len(seen) == (2 if "--bs" in flags else 5)


@pytest.mark.parametrize("arch", ["mpt"], scope="session")
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_prompt_begins_with_the_start_token(run, tmp_path, monkeypatch, side) -> None:
    """Also where it is cut: it counts as one of the prompt's. Texts are kept by it."""
    fed = []
    generate = MptForCausalLM.generate

    def watched(self, input_ids, **options):
        fed.append((input_ids, options["attention_mask"]))
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(MptForCausalLM, "generate", watched)
    flags = ["--bs", "5", "--padding_side", side, "--max_tokenizer_length", "250"]
    flags += ["--store", str(tmp_path / "store"), "--return_tensors", "pt"]
    _, without = run(*flags)
    _, lines = run(*flags, "--decoder_start_token_id", "7")
    (plain, was_real), (ids, real) = fed
    for row, seen, before, was_seen in zip(ids, real, plain, was_real, strict=True):
        text, expected = row[seen.bool()].tolist(), before[was_seen.bool()].tolist()
        assert text[0] == 7 and len(text) <= 250
        assert len(text) == min(250, len(expected) + 1) or len(expected) == 250
        assert text[1:20] == expected[:19] and text[-9:] == expected[-9:]
    assert lines != without  # and nothing of the other run was taken from the store
    more = ["--save_prompt_attentions", "--attentions_path", str(tmp_path / "att")]
    assert run(*flags, *more, "--decoder_start_token_id", "7")[1] == lines
    (file,) = (tmp_path / "att").iterdir()
    with np.load(file) as saved:
        assert saved["step0000_layer00_weights"].shape[-1] == ids.shape[1]
    _, again = run(
        *flags, "--decoder_start_token_id", str(ids[0, 1 + int(real[0].argmax())].item())
    )
    assert again == without and fed[-1][0].shape == plain.shape  # none is put before itself


@pytest.mark.parametrize("arch", ["gptj"], scope="session")
def test_workers_change_nothing(run, tmp_path, monkeypatch) -> None:
    """Prompts are made in threads and ROUGE in processes: the same texts, from the same items of
    the store, and the same scores."""
    flags = ["--max_tokenizer_length", "250", "--store", str(tmp_path / "store")]
    alone, lines = run(*flags)
    threads, made = set(), data.make_prompt

    def make_prompt(*given):
        threads.add(threading.get_ident())
        return made(*given)

    monkeypatch.setattr(data, "make_prompt", make_prompt)
    shared, again = run(*flags, "--preprocess_workers", "3", "--postprocess_workers", "2")
    assert again == lines and shared["items_from_store"] == 5
    assert {name: shared[name] for name in METRICS} == {name: alone[name] for name in METRICS}
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize("arch", ["cerebras"], scope="session")
def test_spaces_are_cleaned_up(run, tmp_path, monkeypatch) -> None:
    """Before punctuation and contractions, also where transformers' decoding would not."""
    decode = PreTrainedTokenizerBase.batch_decode

    def spaced(self, *given, **options):
        return ["it 's a key , I do n't know ." for _ in decode(self, *given, **options)]

    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", spaced)
    flags = ["--store", str(tmp_path / "store"), "--n_obs", "1"]
    assert run(*flags)[1] == ["it 's a key , I do n't know ."]
    assert run(*flags, "--clean_up_tokenization_spaces")[1] == ["it's a key, I don't know."]


@pytest.mark.parametrize("arch", ["mpt"], scope="session")
def test_more_items_than_there_are_is_all_of_them(run, tmp_path, caplog) -> None:
    flags = ["--store", str(tmp_path / "store")]
    scores, lines = run(*flags, "--n_obs", "6")
    assert scores["items"] == 5 and run(*flags)[1] == lines
    (said,) = (record.getMessage() for record in caplog.records if "n_obs" in record.getMessage())
    assert said == "--n_obs 6: all of the dataset is taken, which has 5"


@pytest.mark.parametrize("which", ["--save_attentions", "--save_prompt_attentions"])
def test_attentions_are_saved_without_pickle(run, tmp_path, which: str) -> None:
    run(which, "--attentions_path", str(tmp_path / "att"), "--keyformer", "--n_obs", "2")
    files = sorted((tmp_path / "att").iterdir())
    assert [file.name for file in files] == ["000000.npz", "000001.npz"]
    with np.load(files[0], allow_pickle=False) as saved:
        steps = {name.split("_")[0] for name in saved.files}
        assert saved["step0001_layer00_positions" if len(steps) > 1 else saved.files[1]].ndim == 3
    assert ("step0000" in steps) == (which == "--save_prompt_attentions")
    assert len(steps) == (4 if which == "--save_attentions" else 1)


def test_prompts_in_chunks(run) -> None:
    """Full attention gives the same summaries; of an evicting method the caches stay as large."""
    options = ("--attention", "full", "--bs", "3")
    assert run(*options)[1] == run(*options, "--prefill_chunk", "50")[1]
    whole, _ = run("--keyformer", "--kv_cache", "50")
    chunked, _ = run("--keyformer", "--kv_cache", "50", "--prefill_chunk", "50")
    assert chunked["config"]["prefill_chunk"] == 50
    assert chunked["kv_bytes_prompt"] == whole["kv_bytes_prompt"]


BAD = [
    (["--kv_cache", "0"], "kv_cache"),
    (["--kv_cache", "101", "--attention", "full"], "101"),
    (["--kv_cache", "nan"], "nan"),
    (["--recent", "-1"], "recent"),
    (["--recent", "100.5", "--attention", "window"], "100.5"),
    (["--tau_init", "0"], "tau_init"),
    (["--tau_end", "-2", "--keyformer"], "tau_end"),
    (["--kv_budget", "0"], "kv_budget"),
    (["--prefill_chunk", "0"], "prefill_chunk"),
    (["--prefill_chunk", "8", "--save_attentions"], "--save_attentions"),
    (["--keyformer", "--attention", "h2o"], "h2o"),
    (["--attention", "snapkv"], "snapkv"),
    (["--bs", "0"], "--bs"),
    (["--bs", "two"], "two"),
    (["--beam", "0"], "--beam"),
    (["--n_obs", "0"], "--n_obs must be at least 1, got 0"),
    (["--temperature", "0.5"], "--do_sample"),
    (["--do_sample", "--top_p", "1.5"], "1.5"),
    (["--num_return_sequences", "2"], "--beam"),
    (["--min_gen_length", "9"], "--max_new_tokens 5"),
    (["--max_tokenizer_length", "3"], "max_tokenizer_length 3"),
    (["--padding", "max_length", "--no_truncation"], "--no_truncation"),
    (["--return_tensors", "tf"], "must be pt, as generation here runs on PyTorch, got tf"),
    (["--decoder_start_token_id", "320"], "must be below 320, the model's tokens, got 320"),
    (["--decoder_start_token_id", "-1"], "--decoder_start_token_id must be at least 0"),
    (["--preprocess_workers", "0"], "--preprocess_workers"),
    (["--postprocess_workers", "two"], "two"),
    (["--no-causal_lm"], "encoder-decoder"),
    (["--model_parallelize"], "--device"),
    (["--task", "translation"], "translation"),
    (["--dtype", "float8"], "float8"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--device", "toaster"], "toaster"),
    (["--dataset_path", "nowhere.json"], "nowhere.json"),
    (["--model_path", "nowhere/model"], "nowhere/model"),
    (["--save_path", "{file}/s.txt"], "file"),
    (["--score_path", "{folder}"], "it is a folder"),
    (["--save_attentions", "--attentions_path", "{file}"], "file"),
    (["--save_path", "{file}/s.txt", "--model_path", "nowhere"], "cannot write"),
    (["--no_such_flag"], "no_such_flag"),
]


@pytest.mark.parametrize(("flags", "says"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    flags, says, mpt_path, dataset_path, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("kept")
    kept = '{"command": "python summarize.py"}'
    (tmp_path / "scores.json").write_text(kept)
    places = {"file": tmp_path / "file", "folder": tmp_path}
    argv = ["--model_path", str(mpt_path), "--dataset_path", str(dataset_path)]
    argv += ["--save_path", str(tmp_path / "s.txt"), "--score_path", str(tmp_path / "scores.json")]
    argv += ["--device", "cpu", "--max_new_tokens", "5", *(f.format(**places) for f in flags)]
    monkeypatch.setattr(sys, "argv", ["summarize.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda _: summarize.main(argv))
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if "Loading weights" not in line]  # its progress bar
    assert stopped.value.code == 2
    assert len(lines) == 1 and says in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "scores.json"]
    assert (tmp_path / "scores.json").read_text() == kept


def test_the_released_flags_agree_with_each_other() -> None:
    """All of run_summarization_task.sh; --device cuda is no one GPU."""
    parser = task_parser(None, "summarization", Path(), texts="out.summary")
    argv = "--device cuda --task summarization --bs 1 --dtype bfloat16 --causal_lm --early_stopping"
    argv += " --output_summaries_only --padding_side left --beam 4 --keyformer --kv_cache 60"
    argv += " --recent 30 --tau_init 1 --tau_end 2 --no_repeat_ngram_size 0 --repetition_penalty 1"
    argv += " --max_tokenizer_length 1920 --max_new_tokens 128 --min_gen_length 30 --n_obs 10"
    argv += " --num_return_sequences 1 --seed 12345 --model_parallelize"
    flags = parser.parse_args(argv.split())
    check_task_flags(flags)
    assert method_config(flags)[0] == "keyformer" and flags.model_parallelize


def test_compare_prints_methods_side_by_side(mpt_path, dataset_path, tmp_path, capsys) -> None:
    record = tmp_path / "record.json"
    compare.main(
        [
            *("--model_path", str(mpt_path), "--dataset_path", str(dataset_path)),
            *("--device", "cpu", "--methods", "full", "h2o", "keyformer", "--kv_cache", "30", "60"),
            *("--seeds", "0", "1", "--max_new_tokens", "4", "--show", "2"),
            *("--prefill_chunk", "50"),
            *("--record", str(record)),
        ]
    )
    printed = capsys.readouterr().out
    assert printed.count("reference: the key tokens.") == 2
    rows = json.loads(record.read_text())["rows"]
    assert [(row["method"], row["kv_cache"], row["seed"]) for row in rows] == [
        ("full", 100, 0),
        ("h2o", 30, 0),
        ("h2o", 60, 0),
        ("keyformer", 30, 0),
        ("keyformer", 30, 1),
        ("keyformer", 60, 0),
        ("keyformer", 60, 1),
    ]
    assert {row["config"]["prefill_chunk"] for row in rows} == {50}
    sizes = [row["kv_bytes_end"] for row in rows]
    assert sizes[1] == sizes[3] < sizes[2] == sizes[5] < sizes[0]


def test_compare_asks_questions(mpt_path, tmp_path, capsys) -> None:
    """A question counts as answered where the greedy text, here without a cache, has the answer."""
    article = "The key is in town. Others leave."
    prompt = conversation(
        [
            user(
                f"{article}\n\nAnswer the question with words from the article."
                "\nQuestion: Where is it?"
            )
        ],
        None,
        "alpaca",
    )
    model, tokenizer = load_model(mpt_path, dtype="float32", device="cpu")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    text = model.generate(ids, max_new_tokens=16, do_sample=False, use_cache=False)
    right = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
    assert right.strip()
    question = {"question": "Where is it?", "answer": right}
    items = [{"article": "None.", "summary": "No.", "questions": [question]}]
    items.append({"article": article, "summary": "The key.", "questions": [question] * 2})
    items[1]["questions"][1] = {"question": "Where is it?", "answer": "a garden"}
    data, record = tmp_path / "articles.json", tmp_path / "record.json"
    data.write_text(json.dumps(items))
    flags = ["--model_path", str(mpt_path), "--dataset_path", str(data), "--device", "cpu"]
    flags += ["--methods", "full", "window", "--kv_cache", "5", "--max_new_tokens", "2"]
    flags += ["--items", "1", "--questions", "--show", "1", "--store", str(tmp_path / "store")]
    compare.main([*flags, "--record", str(record)])
    full, window = json.loads(record.read_text())["rows"]
    assert (full["items"], full["questions"], full["answered"]) == (1, 2, 1)
    assert (window["questions"], window["answered"]) == (2, 0)
    printed = capsys.readouterr().out
    assert printed.count("Where is it? (") == 2 and "1 of 2" in printed and "0 of 2" in printed
    with pytest.raises(InputError, match="--items must be from 0 to 1, got 2"):
        compare.main([*flags, "--items", "2"])
    data.write_text(json.dumps([{"article": "A.", "summary": "B."}]))
    with pytest.raises(InputError, match="item 0 is no article with questions"):
        compare.main(flags)


def test_questions_that_have_no_room_are_named(tmp_path) -> None:
    """Summaries are cut, questions cannot be; before anything is generated."""
    path = write_original(tmp_path / "gptj", "gptj", "safetensors")
    question = {"question": "Where is it?", "answer": "a garden"}
    items = [{"article": "The key.", "summary": "A key.", "questions": [question]}]
    items.append({**items[0], "article": "The key is here. " * 1000})
    data = tmp_path / "articles.json"
    data.write_text(json.dumps(items))
    flags = ["--model_path", str(path), "--dataset_path", str(data), "--device", "cpu"]
    flags += ["--methods", "full", "--max_new_tokens", "2", "--store", str(tmp_path / "store")]
    with pytest.raises(InputError, match=r"item 1 with a question has .* leave out --questions"):
        compare.main([*flags, "--questions"])
