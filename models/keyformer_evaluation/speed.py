"""Speed and memory of models with random weights: engines side by side, and the floor.

The floor of a decode step is the time in which its weights and the kept keys and values can
be read once, at the bandwidth that a large copy reaches on the same device in the same run.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from keyformer.cache import KeyformerCache
from keyformer.config import InputError, KeyformerConfig
from keyformer.integration import DTYPES, check_device, enable_keyformer
from keyformer.replay import LEAST_STEPS
from keyformer_evaluation.records.results import check_record, run_record, write_json, write_picture
from keyformer_evaluation.studies.tables import print_columns
from keyformer_evaluation.tasks.flags import PERCENT, PERCENT_ABOVE_0, Parser, whole

if TYPE_CHECKING:  # what draws nothing goes without matplotlib
    from matplotlib.figure import Figure

SHAPES: dict[str, dict[str, Any]] = {
    "mpt-7b": {
        "model_type": "mpt",
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 32,
        "vocab_size": 50432,
        "max_seq_len": 32768,
    },
    "gpt-j-6b": {"model_type": "gptj", "n_positions": 16384},
    "cerebras-gpt-6.7b": {
        "model_type": "gpt2",
        "n_embd": 4096,
        "n_head": 32,
        "n_layer": 32,
        "n_positions": 16384,
        "activation_function": "gelu",
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "model_type": "mpt",
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "vocab_size": 64,
        "max_seq_len": 65536,
    },
    "tiny-llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 65536,
    },
}
"""Of the paper's models, with tables of positions that the longest measurement fits in, and of
one whose query heads share keys and values."""

ENGINES = ("stock", "full", "window", "h2o", "keyformer")
"""transformers' own model, and methods of this one: full keeps all, window scores nothing."""

STEPS = 4
"""Decode steps of a timing, one after the other, so that the host's part overlaps the device's."""

TINY = ("tiny", "tiny-llama")
MOST_OF_TINY = 64
"""The largest default size where all models are tiny ones, which only show that a script works."""
REPEATS_OF_TINY = 3

FIRST = 2 * LEAST_STEPS
"""New tokens before a stretch: among them is the capture of a step."""

STOCK_CHUNK = 512
"""Tokens that stock attends from at a time if it runs out of memory with a whole prompt."""

COPIED_BYTES = {"cuda": 2**32, "cpu": 2**26}
"""Of the copy that measures bandwidth: many times a cache."""

PICTURES = (".png", ".svg")

Record = dict[str, Any]


class Speed:
    """What one script measures: its flags in; a table and a record out.

    Parameters
    ----------
    name, description
        Of the script; the record is written to ``folder``/results/local/``name``.json, unless
        --output says otherwise.
    defaults
        Flags of the script's own and their defaults: a whole number, or a tuple of them.
    draws
        Whether the record gets a picture beside it.

    Attributes
    ----------
    flags
        What was asked for; each of ``defaults`` by its name.
    device, dtype
        Where and in what the models are.
    """

    def __init__(
        self,
        name: str,
        description: str | None,
        argv: Sequence[str] | None,
        folder: Path,
        *,
        draws: bool = False,
        **defaults: int | tuple[int, ...],
    ) -> None:
        parser = Parser(description=description, formatter_class=argparse.RawTextHelpFormatter)
        parser.add_argument(
            "--model", nargs="+", choices=SHAPES, default=["mpt-7b"], help="shapes of models"
        )
        parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
        parser.add_argument(
            "--kv_cache", type=PERCENT_ABOVE_0, default=50.0, help="%% of the prompt"
        )
        parser.add_argument("--recent", type=PERCENT, default=30.0, help="%% of the cache")
        parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
        parser.add_argument("--device", help="default: a GPU if there is one")
        parser.add_argument(
            "--repeats", type=whole(1), default=20, help="of which the median counts"
        )
        parser.add_argument("--output", default=folder / "results" / "local" / f"{name}.json")
        for flag, default in defaults.items():
            several: dict[str, Any] = {} if isinstance(default, int) else {"nargs": "+"}
            parser.add_argument(f"--{flag}", type=whole(1), default=default, **several)
        self.flags = parser.parse_args(argv)
        if set(self.flags.model) <= set(TINY):
            small = {flag: _at_most(MOST_OF_TINY, default) for flag, default in defaults.items()}
            parser.set_defaults(**small, repeats=REPEATS_OF_TINY)
            self.flags = parser.parse_args(argv)
        self.configs = {name: self.config(name, self.flags.kv_cache) for name in ENGINES}
        self.device = check_device(self.flags.device)
        self.dtype = DTYPES[self.flags.dtype]
        output = Path(self.flags.output)
        pictures = [output.with_suffix(kind) for kind in PICTURES] if draws else []
        check_record(output, *pictures)

    def check_positions(self, tokens: int) -> None:
        """Refuse texts that a model has no positions for, before anything is measured.

        Raises
        ------
        InputError
            If a model's table has fewer than ``tokens``, those of the longest text.
        """
        for shape in self.flags.model:
            config = _model_config(shape)
            biases = getattr(config, "max_seq_len", None)  # of which only stock makes a table
            table = biases or config.max_position_embeddings
            if tokens > table and not (biases and "stock" not in self.flags.engine):
                raise InputError(
                    f"--model {shape} has {table} positions, and the longest text needs {tokens}"
                )

    def config(self, engine: str, kv_cache: float) -> KeyformerConfig | None:
        """An engine's method at a cache size in percent; None for stock transformers."""
        settings = {"kv_cache": kv_cache, "recent": self.flags.recent, "seed": 0}
        return None if engine == "stock" else KeyformerConfig.preset(engine, **settings)

    def benches(self) -> Iterator[Bench]:
        """Each model in turn, alone in memory, with a bandwidth measured beside it."""
        for name in self.flags.model:
            bench = Bench(name, self.dtype, self.device, self.flags.repeats)
            yield bench
            del bench
            free(self.device)

    def draw(self, figure: Figure) -> None:
        """The picture beside the record, as PNG and SVG."""
        for kind in PICTURES:
            write_picture(Path(self.flags.output).with_suffix(kind), figure)

    def write(self, rows: Iterable[Record]) -> list[Record]:
        """Say each row as it comes, then print all and write them with how they came about.

        Rows that came before an error are written, too.
        """
        done: list[Record] = []
        try:
            for row in rows:
                done.append(row)
                shown = (f"{name} {_shown(value)}" for name, value in row.items())
                print(", ".join(shown), flush=True)
        finally:
            if done:
                self._finish(done)
        return done

    def _finish(self, done: Sequence[Record]) -> None:
        heads = list(dict.fromkeys(name for row in done for name in row))
        print()
        print_columns([heads, *([_shown(row.get(name)) for name in heads] for row in done)])
        flags = {name: str(value) for name, value in vars(self.flags).items()}
        write_json(self.flags.output, {**run_record(self.device), "flags": flags, "rows": done})


class Bench:
    """The same random weights in transformers' own model and in the evicting one.

    Attributes
    ----------
    weight_bytes
        Bytes of parameters that a decode step reads.
    bandwidth
        Bytes a second, read and written, of a large copy.
    layers, heads, kv_heads, head_dim
        The model's sizes.
    """

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device, repeats: int) -> None:
        self.shape, self.device, self.repeats = shape, device, repeats
        config = _model_config(shape)
        config.update({"use_cache": True, "eos_token_id": None, "pad_token_id": 0})
        torch.manual_seed(0)
        with torch.device(device):
            self.stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        shared = {id(t): t for t in (*self.stock.parameters(), *self.stock.buffers())}
        self.evicting = enable_keyformer(copy.deepcopy(self.stock, shared))
        read = {id(p): p.nbytes for p in self.stock.parameters()}
        embedding = self.stock.get_input_embeddings().weight
        if embedding is not self.stock.get_output_embeddings().weight:
            del read[id(embedding)]  # of which a step reads a row
        self.weight_bytes = sum(read.values())
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = config.hidden_size // self.heads
        self.bandwidth = self._bandwidth()

    def _bandwidth(self) -> float:
        source = torch.ones(COPIED_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e3 * source.nbytes / self.median_ms(lambda: target.copy_(source))

    def model(self, config: KeyformerConfig | None) -> PreTrainedModel:
        """The model that runs a method; None is stock transformers."""
        return self.stock if config is None else enable_keyformer(self.evicting, config)

    def cache(self, config: KeyformerConfig | None, new_tokens: int = 1) -> Any:
        """An empty cache for a prompt and ``new_tokens`` after it."""
        if config is None:
            return DynamicCache(config=self.stock.config)
        cache = KeyformerCache(self.evicting.config, config)
        cache.max_new_tokens = new_tokens
        return cache

    def tokens(self, batch: int, length: int) -> Tensor:
        """Random ones, (batch, length)."""
        vocabulary = self.stock.config.vocab_size
        return torch.randint(1, vocabulary, (batch, length), device=self.device)

    def kept_bytes(self, config: KeyformerConfig | None, batch: int, prompt: int) -> int:
        """Bytes of keys and values that a step after a prompt reads."""
        kept = prompt if config is None else min(prompt, config.budget(prompt))
        of_token = 2 * self.layers * self.kv_heads * self.head_dim * self.stock.dtype.itemsize
        return batch * kept * of_token

    def floor_ms(self, config: KeyformerConfig | None, batch: int, prompt: int) -> float:
        """The least time of a decode step after a prompt."""
        read = self.weight_bytes + self.kept_bytes(config, batch, prompt)
        return 1e3 * read / self.bandwidth

    def prefill(self, config: KeyformerConfig | None, batch: int, prompt: int) -> Record:
        """Median time of a prompt, and the most memory beside the weights."""
        model, text = self.model(config), self.tokens(batch, prompt)
        held: list[Any] = []

        def run() -> None:
            held[:] = [self.cache(config)]
            model(input_ids=text, past_key_values=held[0], use_cache=True, logits_to_keep=1)

        before = self._reset_peak()
        ms = self.median_ms(run)
        return {"ms": ms, "peak_gb": self._peak_gb(before)}

    def decode_step(self, config: KeyformerConfig | None, batch: int, prompt: int) -> Record:
        """Median time of a decode step after a prompt, of STEPS in a row, and of its capture."""
        model, token = self.model(config), self.tokens(batch, 1)
        cache = self.cache(config, new_tokens=prompt)
        if config is None:
            self._fill(cache, batch, prompt)
        else:
            text = self.tokens(batch, prompt)
            model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1)

        def step() -> None:
            seen = cache.get_seq_length()
            mask = torch.ones(batch, seen + 1, dtype=torch.long, device=self.device)
            model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)

        step()  # compiles the kernels
        self._wait()
        start = time.perf_counter()
        step()  # captures the graph, where there is one
        self._wait()
        capture_ms = 1e3 * (time.perf_counter() - start)

        def some_steps() -> None:
            for _ in range(STEPS):
                step()

        ms = self.median_ms(some_steps) / STEPS
        floor = self.floor_ms(config, batch, prompt)
        captured = getattr(cache, "graph", None) is not None
        return {
            "ms": ms,
            "floor_ms": floor,
            "floor / ms": floor / ms,
            "capture_ms": capture_ms if captured else None,
        }

    def attention(self, config: KeyformerConfig | None, batch: int, prompt: int) -> float:
        """Median ms of what all layers of a decode step do between query and output; not stock's.

        Their keys and values are random. On a GPU the layers are captured and replayed.
        """
        cache = self.cache(config, new_tokens=prompt)
        options: dict[str, Any] = {"dtype": self.stock.dtype, "device": self.device}
        queries = torch.randn(batch, self.heads, prompt, self.head_dim, **options)
        pairs = torch.randn(2, batch, self.kv_heads, prompt, self.head_dim, **options)

        def attend(tokens: int) -> None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=self.device)
            query, (key, value) = queries[:, :, :tokens], pairs[:, :, :, :tokens]
            for layer in range(self.layers):
                cache.attend(query, key, value, layer, real, scale=self.head_dim**-0.5)

        for tokens in (prompt, 1):
            attend(tokens)
        run: Callable[[], Any] = lambda: attend(1)  # noqa: E731
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                attend(1)
            run = graph.replay
        return self.median_ms(run)

    def generation(
        self,
        config: KeyformerConfig | None,
        batch: int,
        prompt: int,
        new: int,
        beams: int,
        stretch: int,
    ) -> Record:
        """Seconds of ``generate``, tokens a second, the share of the floor's speed, and memory.

        Of more than ``stretch`` new tokens, that many are timed at three lengths and integrated.
        Where memory does not suffice for stock's attention over a whole prompt, it is read in
        chunks, which transformers offers.
        """
        if config is not None:
            self.generate(config, batch, prompt, FIRST, beams)  # compiles the kernels
        chunk = None
        before = self._reset_peak()
        try:
            seconds = self._seconds(config, batch, prompt, new, beams, stretch)
        except torch.OutOfMemoryError:
            if config is not None:
                raise
            chunk = STOCK_CHUNK
        if chunk is not None:
            before = self._reset_peak()
            seconds = self._seconds(config, batch, prompt, new, beams, stretch, chunk)
        # A cache that keeps everything grows from the prompt to all of the text.
        grows = config is None or config.budget(prompt) > prompt
        ends = (prompt, prompt + new) if grows else (prompt, prompt)
        floor = sum(self.floor_ms(config, batch * beams, end) for end in ends) / 2e3 * new
        return {
            "seconds": seconds,
            "tokens/s": batch * new / seconds,
            "floor_seconds": floor,
            "floor / seconds": floor / seconds,
            "peak_gb": self._peak_gb(before),
            "prompt_chunk": chunk,
        }

    def _seconds(
        self,
        config: KeyformerConfig | None,
        batch: int,
        prompt: int,
        new: int,
        beams: int,
        stretch: int,
        chunk: int | None = None,
    ) -> float:
        """Seconds of ``generate``: of all of it, or by Simpson's rule over three stretches."""
        if FIRST + stretch >= new:
            return self.generate(config, batch, prompt, new, beams, chunk=chunk)[-1]
        if config is not None:
            config = replace(config, kv_budget=config.budget(prompt))  # as after the prompt
        times, some = [], FIRST + stretch
        for length in (prompt + new, prompt + new // 2, prompt):
            first, last = self.generate(config, batch, length, some, beams, FIRST, chunk)
            times.append((last - first) / stretch)
        end, middle, begin = times
        return first + (new - FIRST) * (begin + 4 * middle + end) / 6

    def generate(
        self,
        config: KeyformerConfig | None,
        batch: int,
        prompt: int,
        new: int,
        beams: int,
        first: int = 0,
        chunk: int | None = None,
    ) -> list[float]:
        """Seconds of ``generate``, greedy or with beams, on random prompts.

        Returns
        -------
        list
            From the start to the ``first`` new tokens, if any, and to all of them.
        """
        model, text = self.model(config), self.tokens(batch, prompt)
        times = []

        def look(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
            if tokens.shape[1] == prompt + first:
                self._wait()
                times.append(time.perf_counter() - start)
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        self._wait()
        start = time.perf_counter()
        model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            stopping_criteria=[look] if first else None,
            prefill_chunk_size=chunk,
        )
        self._wait()
        return [*times, time.perf_counter() - start]

    def fits(self, config: KeyformerConfig, batch: int, prompt: int, new: int) -> bool:
        """Whether prompts and ``new`` tokens after each fit in memory."""
        free(self.device)
        try:
            model, cache = self.model(config), self.cache(config, new)
            text = self.tokens(batch, prompt)
            for tokens in (text, text[:, :1], text[:, :1], text[:, :1]):
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._wait()
        except torch.OutOfMemoryError:
            return False
        return True

    def _fill(self, cache: DynamicCache, batch: int, length: int) -> None:
        """Random keys and values, as after a prompt of any length."""
        shape = (batch, self.kv_heads, length, self.head_dim)
        for layer in range(self.layers):
            pair = torch.randn(2, *shape, dtype=self.stock.dtype, device=self.device)
            cache.update(*pair, layer)

    def attempt(self, measure: Callable[..., Record], *arguments: Any) -> Record:
        """A measurement, or that the device's memory did not suffice for it."""
        try:
            return measure(*arguments)
        except torch.OutOfMemoryError:
            return {"ms": "out of memory"}
        finally:
            free(self.device)

    def median_ms(self, run: Callable[[], Any]) -> float:
        """Median of ``repeats`` timings after a warm-up, by the device's clock."""
        times = []
        for number in range(self.repeats + 2):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                run()
                elapsed = 1e3 * (time.perf_counter() - began)
            if number > 1:
                times.append(elapsed)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> int:
        free(self.device)
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak_gb(self, before: int) -> float | None:
        """Gigabytes above ``before``; None where allocations are not counted."""
        if self.device.type != "cuda":
            return None
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9


def longest_text(prompt: int, new: int, stretch: int) -> int:
    """The tokens of the longest text that :meth:`Bench.generation` measures."""
    if FIRST + stretch >= new:
        return prompt + max(new, FIRST)
    return prompt + new + FIRST + stretch


def free(device: torch.device) -> None:
    """Give back what dead models and caches held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _model_config(shape: str) -> Any:
    settings = dict(SHAPES[shape])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _at_most(most: int, default: int | tuple[int, ...]) -> int | list[int]:
    """A default size, or several, none above ``most`` and none twice."""
    if isinstance(default, int):
        return min(default, most)
    return list(dict.fromkeys(min(size, most) for size in default))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
