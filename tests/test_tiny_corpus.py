"""The tiny model's corpus (what it promises about splits and layout) and its training script."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MptConfig, MptForCausalLM

from keyformer import InputError
from keyformer.evaluation.data import alpaca_prompt
from tiny import corpus, train

EVAL = [corpus.item("eval", i) for i in range(1500)]
TRAIN = [corpus.item("train", i) for i in range(6000)]


@pytest.fixture(scope="module")
def tokenizer():
    return train.fit_tokenizer(2048, 1500)


def test_a_document_is_a_function_of_split_and_index():
    assert corpus.document("eval", 7) == corpus.document("eval", 7)
    assert corpus.document("eval", 7) != corpus.document("eval", 8)
    assert corpus.document("eval", 7) != corpus.document("train", 7)
    assert set(corpus.document("train", 0)) == {"instruction", "input", "output"}
    with pytest.raises(ValueError, match="split"):
        corpus.document("test", 0)


def test_every_event_type_occurs():
    assert len(corpus.EVENTS) >= 10
    assert len({made.summary[:8] for made in EVAL}) >= len(corpus.EVENTS)


def names(texts: list[str], first: list[str], second: list[str], glue: str) -> set[str]:
    pattern = rf"\b(?:{'|'.join(first)}){glue}(?:{'|'.join(second)})\b"
    return set(re.findall(pattern, " ".join(texts)))


@pytest.mark.parametrize(
    ("first", "second", "glue"),
    [
        (corpus.FIRST, corpus.LAST, " "),
        (corpus.PLACE_A, corpus.PLACE_B, ""),
        (corpus.RIVER_A, corpus.RIVER_B, ""),
        (corpus.ORG_A, corpus.ORG_B, " "),
    ],
)
def test_splits_share_no_full_name(first, second, glue):
    held_out = names([made.report for made in EVAL], first, second, glue)
    seen = names([made.report for made in TRAIN], first, second, glue)
    assert len(held_out) > 20
    assert len(seen) > 100
    assert not held_out & seen


def test_splits_share_no_combination_of_facts():
    def combinations(made: corpus.Item) -> set[tuple[str, str]]:
        values = [value for value, _ in made.facts.values()]
        named = [value for value in values if value[0].isupper()]
        return {(name, value) for name in named for value in values if name != value}

    held_out = set().union(*map(combinations, EVAL))
    assert not held_out & set().union(*map(combinations, TRAIN))


def test_every_fact_is_stated_in_report_and_summary():
    for made in EVAL:
        report, summary = made.report.lower(), made.summary.lower()
        assert len(made.facts) >= 10
        for value, at in made.facts.values():
            assert report[at : at + len(value)] == value.lower()
            assert value.lower() in summary


def test_names_and_figures_of_the_summary_stand_once_in_the_report():
    for made in EVAL[:300]:
        for value, _ in made.facts.values():
            if re.fullmatch(r"[A-Z]\w+ [A-Z]\w+", value):
                assert made.report.count(value) == 1


def test_most_facts_stand_in_the_first_half_but_not_in_the_first_sentence():
    places = [at / len(made.report) for made in EVAL for _, at in made.facts.values()]
    assert 0.7 < sum(place < 0.5 for place in places) / len(places) < 0.85
    assert sum(place < 0.65 for place in places) / len(places) < 0.97
    for made in EVAL:
        end = made.report.index(". ")
        assert not any(at < end for _, at in made.facts.values())


def test_summaries_are_short_and_dense():
    shares = []
    for made in EVAL:
        words = re.findall(r"[a-z0-9]+", made.summary.lower())
        assert 35 <= len(words) <= 80
        known = " ".join(value for value, _ in made.facts.values()).lower()
        facts = set(re.findall(r"[a-z0-9]+", known)) - {"a", "the", "of"}
        pairs = list(pairwise(words))
        shares.append(sum(a in facts or b in facts for a, b in pairs) / len(pairs))
    assert sum(shares) / len(shares) > 0.7


def test_report_lengths(tokenizer):
    lengths = sorted(len(tokenizer.encode(made.report).ids) for made in EVAL[:400])
    assert lengths[0] > 230
    assert lengths[-1] < 960
    assert lengths[40] < 420
    assert lengths[-40] > 700


def test_digits_stand_alone_and_text_survives(tokenizer):
    text = 'On Friday, 1,234 "crowns" in Alderwick.'
    encoded = tokenizer.encode(text)
    assert [token for token in encoded.tokens if token.isdigit()] == list("1234")
    assert tokenizer.decode(encoded.ids) == text


def test_command_line(tmp_path, capsys):
    out = tmp_path / "sub" / "eval.json"
    corpus.main(["--split", "eval", "--n", "3", "--output", str(out)])
    assert json.loads(out.read_text()) == [corpus.document("eval", i) for i in range(3)]
    capsys.readouterr()
    bad = [["--n", "0"], ["--split", "all"], ["--n", "x"]]
    for arguments in bad:
        with pytest.raises(SystemExit) as exit_info:
            corpus.main(["--output", str(out), *arguments])
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="cannot write"):
        corpus.main(["--output", "/dev/null/x"])


def test_batches_use_each_document_once_and_mark_parts(tokenizer):
    batches = train.Batches(tokenizer, "train", 0, 8192, ramp=1)
    rows = [row for batch in batches.batches(list(range(40))) for row in batch]
    want = []
    for i in range(40):
        made = corpus.document("train", i)
        prompt = alpaca_prompt(made["instruction"], made["input"])
        ids = tokenizer.encode(prompt).ids + tokenizer.encode(made["output"]).ids + [0]
        want.append((ids, len(tokenizer.encode(prompt).ids)))
    assert sorted(rows) == sorted(want)
    ids, parts = train.pad(rows[:2])
    assert ids.shape == parts.shape
    assert ids.shape[1] % train.PAD_TO == 0
    assert (parts[0] > 0).sum() == len(rows[0][0])
    assert (parts[0] == train.REPORT).sum() == rows[0][1]
    first, second = (next(iter(batches)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[0].numel() <= 8192


def test_training_attention_equals_the_stock_model():
    torch.manual_seed(0)
    config = MptConfig(d_model=64, n_layers=3, n_heads=8, max_seq_len=128, vocab_size=100)
    config.initializer_range = 0.3  # large scores, so that attention is far from uniform
    model = MptForCausalLM(config).eval()
    ids = torch.randint(0, 100, (2, 96))
    with torch.no_grad():
        stock = model.transformer(input_ids=ids, use_cache=False).last_hidden_state
        ours = train.mpt_hidden(model, ids, torch.float32)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_three_steps_write_a_loadable_folder(tmp_path: Path, capsys):
    folder = tmp_path / "model"
    sizes = "--d_model 32 --n_layers 2 --n_heads 4 --vocab_size 400 --batch_tokens 3072 --ramp 9000"
    run = "--device cpu --workers 0 --steps 3 --log_every 1 --eval_documents 3 --warmup 1"
    argv = [*sizes.split(), *run.split(), "--tokenizer_documents", "50"]
    train.main([*argv, "--output_dir", str(folder)])
    assert "step 3 " in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, model.config.use_cache) == (torch.float16, True)
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.generation_config.eos_token_id
    assert tokenizer.tokenize("1,234")[-3:] == ["2", "3", "4"]
    ids = tokenizer("Flooding", return_tensors="pt").input_ids
    assert (
        model.float().generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= ids.shape[1] + 2
    )
    assert "held-out loss" in (folder / "README.md").read_text()
    with pytest.raises(SystemExit) as exit_info:
        train.main([*argv, "--output_dir", str(tmp_path)])
    assert exit_info.value.code == 2
