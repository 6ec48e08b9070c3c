"""benchmarks/ and the paper's speed figures, end to end on a tiny model: no speed is judged."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import script

from keyformer import InputError, KeyformerConfig, replay
from keyformer_evaluation.speed.bench import Bench
from keyformer_evaluation.speed.engines import ENGINES
from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.speed.shapes import SHAPES
from keyformer_evaluation.speed.throughput import FIRST, STOCK_CHUNK

SCRIPTS = {
    ("benchmarks", "decode"): (["--prompt", "24", "--batch", "2"], len(ENGINES) - 1),
    ("benchmarks", "prefill"): (["--prompt", "24"], len(ENGINES) - 1),
    ("benchmarks", "generate"): (
        ["--prompt", "16", "--new", "5", "--batch", "1", "--beams", "1", "2"],
        2 * (len(ENGINES) - 1),
    ),
    ("paper", "fig1"): (["--length", "16", "20", "--stretch", "2"], 6),
    ("paper", "fig9_table1"): (["--prompt", "24", "--stretch", "2", "--beams", "2"], 4),
    ("paper", "fig10"): (["--prompt", "16"], 3),
}


@pytest.mark.parametrize(("folder", "name"), SCRIPTS)
def test_scripts_write_a_record(tmp_path, capsys, folder: str, name: str) -> None:
    flags, count = SCRIPTS[folder, name]
    output = tmp_path / "new" / f"{name}.json"
    common = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--repeats", "1"]
    script(folder, name).main([*common, *flags, "--output", str(output)])
    record = json.loads(output.read_text())
    for field in ("command", "commit", "device", "versions", "flags"):
        assert record[field]
    rows = record["rows"]
    assert len(rows) == count
    assert all(row["model"] == "tiny" for row in rows)
    assert {row["engine"] for row in rows} <= set(ENGINES)
    timed = {"ms", "seconds", "attention_ms"}
    assert all(isinstance(row[field], float) for row in rows for field in timed & set(row))
    assert all(timed & set(row) for row in rows)
    pictures = {path.suffix for path in output.parent.iterdir()} - {".json"}
    assert pictures == ({".png", ".svg"} if folder == "paper" else set())
    assert "keyformer" in capsys.readouterr().out


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("tiny", torch.float32, torch.device("cpu"), repeats=1)


def test_what_is_timed_is_the_step_that_generate_replays(monkeypatch, bench: Bench) -> None:
    captures: list[object] = []
    monkeypatch.setattr(replay, "CAPTURED_ON", ("cpu",))
    monkeypatch.setattr(replay, "_captured", lambda *args: captures.append(args))
    with torch.no_grad():
        bench.decode_step(KeyformerConfig(kv_cache=50, backend="triton"), 1, 16)
    assert captures


def test_the_engines_share_weights_and_text(bench: Bench) -> None:
    ours = dict(bench.evicting.named_parameters())
    for name, parameter in bench.stock.named_parameters():
        assert parameter is ours[name]
    text = bench.tokens(1, 9)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = bench.model(None).generate(text, **options)
    got = bench.model(KeyformerConfig.preset("full")).generate(text, **options)
    assert torch.equal(expected, got)


def test_the_floor_is_bytes_over_bandwidth(bench: Bench) -> None:
    """Two layers of 64: an embedding that is the output too, 12 d^2 a layer, three norms."""
    assert bench.weight_bytes == 4 * (64 * 64 + 2 * 12 * 64**2 + 5 * 64)
    half = KeyformerConfig(kv_cache=50)
    for config, kept in ((None, 30), (KeyformerConfig.preset("full"), 30), (half, 15)):
        assert bench.kept_bytes(config, 3, 30) == 2 * 2 * 3 * kept * 64 * 4
    bench.bandwidth = 1e6
    assert bench.floor_ms(half, 3, 30) == pytest.approx(
        1e-3 * (bench.weight_bytes + bench.kept_bytes(half, 3, 30))
    )


@pytest.mark.parametrize("engine", ["stock", "keyformer"])
def test_query_heads_that_share_keys(engine: str) -> None:
    """Two of four: the cache is half as large, and each measurement knows it."""
    bench = Bench("tiny-llama", torch.float32, torch.device("cpu"), repeats=1)
    config = None if engine == "stock" else KeyformerConfig(kv_cache=50)
    kept = 24 if config is None else 12
    assert bench.kept_bytes(config, 3, 24) == 2 * 2 * 3 * kept * 2 * 16 * 4
    assert bench.decode_step(config, 1, 24)["ms"] > 0
    assert bench.generation(config, 1, 16, 5, 1, 9)["tokens/s"] > 0
    if config is not None:
        assert bench.attention(config, 1, 16) > 0


@pytest.mark.parametrize("shape", ["mpt-7b", "gpt-j-6b", "cerebras-gpt-6.7b", "llama-3-8b"])
def test_stock_has_a_position_for_every_token_measured(shape: str) -> None:
    names = ("max_seq_len", "n_positions", "max_position_embeddings")
    assert max(SHAPES[shape].get(name, 0) for name in names) >= 16384


def test_stock_reads_in_chunks_what_it_has_no_memory_for(bench: Bench, monkeypatch) -> None:
    """The same text, and the record says so; an engine of this repository must manage alone."""
    whole = Bench.generate
    chunks: list[int | None] = []

    def generate(bench, config, batch, prompt, new, beams, first=0, chunk=None):
        chunks.append(chunk)
        if new > FIRST and chunk is None:
            raise torch.OutOfMemoryError
        return whole(bench, config, batch, prompt, new, beams, first, chunk and 7)

    monkeypatch.setattr(Bench, "generate", generate)
    assert bench.generation(None, 2, 16, 40, 1, 4)["prompt_chunk"] == STOCK_CHUNK
    assert chunks == [None, *3 * [STOCK_CHUNK]]
    with pytest.raises(torch.OutOfMemoryError):
        bench.generation(KeyformerConfig(), 2, 16, 40, 1, 4)
    text = bench.tokens(2, 16)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    stock = bench.model(None)
    expected = stock.generate(text, **options)
    assert torch.equal(stock.generate(text, prefill_chunk_size=7, **options), expected)


def test_out_of_memory_is_a_result(bench: Bench) -> None:
    def measure(batch: int) -> dict:
        raise torch.OutOfMemoryError(f"batch {batch}")

    assert bench.attempt(measure, 3) == {"ms": "out of memory"}


@pytest.mark.parametrize("fitting", [0, 1, 2, 5, 8])
def test_largest_batch(bench: Bench, monkeypatch, fitting: int) -> None:
    monkeypatch.setattr(bench, "fits", lambda config, batch, *of: batch <= fitting)
    largest = script("benchmarks", "batch").largest
    assert largest(bench, KeyformerConfig(), 10, 10) == fitting


def test_rows_before_an_error_are_written(tmp_path) -> None:
    output = tmp_path / "record.json"
    speed = Speed("decode", None, ["--device", "cpu", "--output", str(output)], tmp_path)

    def rows():
        yield {"ms": 1.0}
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="broke"):
        speed.write(rows())
    assert json.loads(output.read_text())["rows"] == [{"ms": 1.0}]


def test_unusable_flags(tmp_path) -> None:
    output = ["--output", str(tmp_path / "record.json")]
    with pytest.raises(InputError, match="--prompt"):
        script("benchmarks", "decode").main(["--prompt", "8", "0", *output])
    with pytest.raises(InputError, match="GPU"):
        script("benchmarks", "batch").main(["--device", "cpu", *output])
    with pytest.raises(SystemExit) as stopped:
        script("benchmarks", "decode").main(["--model", "gpt-5", *output])
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())
