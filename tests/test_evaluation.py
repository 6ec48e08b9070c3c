"""What the task scripts share: data, prompts, ROUGE, results, saved attention."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from originals import write_original
from transformers import AutoTokenizer

from keyformer import InputError, KeyformerCache, KeyformerConfig
from keyformer_evaluation.records.results import check_writable, run_record, write_json, write_whole
from keyformer_evaluation.tasks.attentions import AttentionRecorder
from keyformer_evaluation.tasks.data import TASKS, alpaca_prompt, load_items, make_prompt, sample
from keyformer_evaluation.tasks.generation import generate
from keyformer_evaluation.tasks.rouge import mean, rouge

TASK = TASKS["summarization"]
ITEMS = [{"instruction": "Sum up.", "input": f"text {i}", "output": str(i)} for i in range(20)]


@pytest.mark.parametrize("lines", [False, True])
def test_json_list_and_json_lines(tmp_path, lines: bool) -> None:
    path = tmp_path / "data.json"
    text = "\n".join(map(json.dumps, ITEMS)) + "\n" if lines else json.dumps(ITEMS, indent=1)
    path.write_text(text)
    assert load_items(path, TASK) == ITEMS


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("[]", "is empty"),
        ("[1, 2", "not JSON"),
        ("hello", "line 1"),
        (json.dumps(ITEMS[0]) + "\n{", "line 2"),
        ('["a"]', "item 0"),
        (
            json.dumps([*ITEMS, {"instruction": "", "input": "x"}]),
            "item 20 lacks the field 'output'",
        ),
        (
            json.dumps([{**ITEMS[0], "output": None}]),
            "item 0 has a field 'output' that is not text",
        ),
        (json.dumps([ITEMS[0], {**ITEMS[0], "input": " \n"}]), "item 1 has an empty field 'input'"),
        (b"\xff\xfe\x00", "codec"),
    ],
)
def test_unusable_datasets_are_named(tmp_path, content, says: str) -> None:
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(says)) as error:
        load_items(path, TASK)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_sample_is_seeded_and_without_replacement() -> None:
    drawn = [item["output"] for item in sample(ITEMS, 7, seed=1)]
    assert len(set(drawn)) == 7
    assert drawn == sorted(drawn, key=int)
    assert drawn == [item["output"] for item in sample(ITEMS, 7, seed=1)]
    assert drawn != [item["output"] for item in sample(ITEMS, 7, seed=2)]
    assert sample(ITEMS, None, seed=0) == ITEMS
    assert sample(ITEMS, 21, seed=0) == sample(ITEMS, 20, seed=0) == ITEMS
    with pytest.raises(InputError, match="n_obs must be at least 1, got 0"):
        sample(ITEMS, 0, seed=0)


@pytest.mark.parametrize(("asked", "there"), [("cnn", "cnndm"), ("cnndm", "cnn")])
def test_cnn_dailymail_has_two_names(tmp_path, caplog, asked: str, there: str) -> None:
    """The authors' repository's and this one's; a file that is there is the one that is read."""
    path, other = (tmp_path / f"{name}_eval.json" for name in (asked, there))
    other.write_text(json.dumps(ITEMS))
    assert load_items(path, TASK) == ITEMS
    assert [record.getMessage() for record in caplog.records] == [
        f"there is no {path}: {other} is read"
    ]
    path.write_text(json.dumps(ITEMS[:2]))
    assert load_items(path, TASK) == ITEMS[:2] and len(caplog.records) == 1
    with pytest.raises(InputError, match=r"cannot read the dataset .*xsum_eval\.json"):
        load_items(tmp_path / "xsum_eval.json", TASK)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_original(tmp_path_factory.mktemp("tokenizer") / "m", "mpt", "bin")
    return AutoTokenizer.from_pretrained(folder)


def test_prompt_is_cut_inside_the_document(tokenizer) -> None:
    item = {"instruction": "Sum up.", "input": "the recent tokens " * 50, "output": ""}
    whole = make_prompt(item, TASK, tokenizer)
    assert whole == alpaca_prompt(item["instruction"], item["input"])
    assert whole.startswith("Below is an instruction that describes a task, paired with an input")
    assert whole.endswith("\n\n### Response:\n")
    overhead = len(tokenizer(alpaca_prompt("Sum up.", ""))["input_ids"])
    for longest in (overhead + 7, overhead + 30, 10**4):
        cut = make_prompt(item, TASK, tokenizer, longest)
        length = len(tokenizer(cut)["input_ids"])
        assert length <= longest
        assert length > overhead + 3
        head, tail = whole.split(item["input"])
        assert cut.startswith(head) and cut.endswith(tail)
        assert item["input"].startswith(cut.removeprefix(head).removesuffix(tail))
    with pytest.raises(InputError, match="no room"):
        make_prompt(item, TASK, tokenizer, overhead - 5)


def test_rouge_counts_stems_and_sentences() -> None:
    same, other, partial = rouge(
        ["Rivers flood. Dams break.", "abc", "Dams break. Rivers flood."],
        ["The rivers flooded. Dams broke.", "xyz", "Rivers flood. Dams break."],
    )
    # Stems: river flood dam break against the river flood dam broke.
    assert same["rouge1"] == pytest.approx(100 * 2 * (3 / 4 * 3 / 5) / (3 / 4 + 3 / 5))
    assert same["rouge2"] == pytest.approx(100 * 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4))
    assert set(other.values()) == {0}
    # In another order sentences agree one by one (Lsum), but not as one sequence (L).
    assert partial["rougeLsum"] == pytest.approx(100)
    assert partial["rougeL"] == pytest.approx(50)
    assert mean([same, other])["rouge1"] == round(same["rouge1"] / 2, 4)


def test_files_are_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "scores.json"
    write_json(path, {"rouge1": 1})

    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(path, fail)
    assert json.loads(path.read_text()) == {"rouge1": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


def test_unwritable_outputs_are_found_early(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "folder" / "out.txt")
    for path in (tmp_path, tmp_path / "file" / "out.txt"):
        with pytest.raises(
            InputError, match=re.escape(str(path if path == tmp_path else path.parent))
        ):
            check_writable(path)


def test_record_says_how_a_result_came_about() -> None:
    record = run_record("cpu")
    assert set(record) == {"command", "date", "commit", "python", "versions", "device"}
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].startswith("cpu")
    json.dumps(record)


@pytest.mark.parametrize("beams", [1, 2])
def test_saved_attention_carries_its_positions(evicting, padded, tmp_path, beams: int) -> None:
    model = evicting()
    cache = KeyformerCache(model.config, KeyformerConfig(kv_cache=50, seed=0))
    cache.observer = AttentionRecorder(prompt=True, decode=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams}
    model.generate(**padded, past_key_values=cache, **options)
    cache.observer.save(tmp_path / "a.npz")
    saved = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert len(saved.files) == 4 * 2 * 3  # steps, layers, arrays
    for step in range(4):
        for layer in range(2):
            name = f"step{step:04d}_layer{layer:02d}_"
            weights, positions = saved[name + "weights"], saved[name + "positions"]
            queries = saved[name + "query_positions"]
            tokens = 24 if step == 0 else 12 + 1
            assert weights.shape == (3 * beams, 4, 24 if step == 0 else 1, tokens)
            assert positions.shape == (3 * beams, 4, tokens)
            real = queries >= 0
            sums = weights.sum(-1).transpose(0, 2, 1)[real]
            assert sums == pytest.approx(1, abs=1e-5)
            # A query gives no weight to empty slots, padding or later tokens.
            hidden = (positions[:, :, None] < 0) | (
                positions[:, :, None] > queries[:, None, :, None]
            )
            assert (weights * hidden * real[:, None, :, None]).max() == 0
    only_prompt = AttentionRecorder(prompt=True, decode=False)
    cache = KeyformerCache(model.config, KeyformerConfig(seed=0))
    cache.observer = only_prompt
    model.generate(**padded, past_key_values=cache, max_new_tokens=3)
    assert {name[:8] for name in only_prompt.arrays} == {"step0000"}


def test_generation_measures_cache_and_tokens(evicting, tokenizer) -> None:
    """Bytes by hand: slots x heads x (2 x head_dim + position + score), layer by layer."""
    model = evicting()
    model.generation_config.eos_token_id = 60
    prompts = ["the key", "recent tokens"]
    lengths = [len(tokenizer(p)["input_ids"]) for p in prompts]
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    small = tokenizer.vocab_size
    model.resize_token_embeddings(small)
    got = generate(
        model,
        tokenizer,
        prompts,
        KeyformerConfig.preset("h2o", kv_budget=5),
        batch_size=2,
        max_new_tokens=6,
        min_new_tokens=6,
        sequence_scores=True,
    )
    slots = min(5, max(lengths))
    per_slot = 2 * 8 * 4 + 8 + 4
    for of in got:
        assert of.kv_bytes_prompt == 2 * 4 * slots * per_slot  # its share of the batch
        assert of.kv_bytes_end == 2 * 4 * 5 * per_slot
        assert of.tokens == 6 and len(of.texts) == 1
        assert all(score < 0 for score in of.sequence_scores)
    assert len(got) == 2
