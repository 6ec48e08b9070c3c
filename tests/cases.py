"""Random attention problems, fed to a KeyformerCache call by call, and to the oracle."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from oracle import Head
from transformers import PreTrainedConfig

from keyformer import KeyformerCache, KeyformerConfig
from keyformer.score import noise


@dataclass
class Case:
    """Random keys, queries and values, and the sizes of the forward calls they come in."""

    config: KeyformerConfig
    kv_heads: int
    group: int
    prompts: list[int]  # real tokens of each sequence's prompt
    later: list[int]  # tokens of each forward after it, the same for all sequences
    alibi: bool
    seed: int
    rotates: bool = False
    head_dim: int = 4
    device: str = "cpu"
    layers: int = 1  # which are all fed the same; their noise differs

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.batch, self.heads = len(self.prompts), self.kv_heads * self.group
        self.longest = max(self.prompts)
        total = self.longest + sum(self.later)

        def normal(heads: int) -> torch.Tensor:
            drawn = torch.randn(self.batch, heads, total, self.head_dim, generator=generator)
            return (drawn * 1.5).to(self.device)

        self.query, self.key, self.value = (
            normal(self.heads),
            normal(self.kv_heads),
            normal(self.kv_heads),
        )
        slopes = torch.rand(self.heads, generator=generator).to(self.device)
        self.slopes = slopes if self.alibi else None
        self.scale = 1 / math.sqrt(self.head_dim)

    def forwards(self):
        """(start, end) columns of each forward call."""
        edges = [0, self.longest]
        for size in self.later:
            edges.append(edges[-1] + size)
        return list(itertools.pairwise(edges))

    def real(self, start: int, end: int) -> torch.Tensor:
        columns = torch.arange(start, end, device=self.device)
        first = self.longest - torch.tensor(self.prompts, device=self.device)
        return columns[None] >= first[:, None]

    def run(self):
        """The cache after each forward, with the last layer's output of that forward."""
        cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=self.layers), self.config)
        cache.max_new_tokens = 7
        for start, end in self.forwards():
            for layer in range(self.layers):
                output = self.attend(cache, layer, start, end)
            yield cache, (start, end), output

    def attend(self, cache: KeyformerCache, layer: int, start: int, end: int) -> torch.Tensor:
        """The output of these columns in a layer."""
        part = slice(start, end)
        return cache.attend(
            self.query[:, :, part],
            self.key[:, :, part],
            self.value[:, :, part],
            layer,
            self.real(start, end),
            scale=self.scale,
            alibi_slopes=self.slopes,
            rotary=rotary if self.rotates else None,
        ).output

    def columns(self, row: int, h: int, start: int, end: int) -> tuple[list, list, list]:
        """Queries, keys and values of a sequence and head, without padding, for the oracle."""
        real = [start + i for i in range(end - start) if self.real(start, end)[row, i]]
        return (
            [self.query[row, g, real].tolist() for g in self.shared_by(h)],
            self.key[row, h, real].tolist(),
            self.value[row, h, real].tolist(),
        )

    def shared_by(self, kv_head: int) -> range:
        """The query heads of a key/value head."""
        return range(kv_head * self.group, (kv_head + 1) * self.group)

    def places(self) -> list[tuple[int, int]]:
        """Every sequence and key/value head."""
        return list(itertools.product(range(self.batch), range(self.kv_heads)))

    def oracle(self, row: int, kv_head: int, layer: int = 0) -> Head:
        n = self.prompts[row]
        if self.config.kv_budget is not None:
            k = self.config.kv_budget
        else:
            k = max(1, int(n * self.config.kv_cache / 100))
        w = min(int(k * self.config.recent / 100), max(0, k - self.config.sinks))
        total = self.longest + sum(self.later)
        places = torch.arange(total)
        drawn_at = places * (self.config.noise_schedule == "fresh")
        zeta = noise(
            self.config.noise,
            self.config.seed,
            layer,
            self.heads,
            drawn_at.expand(self.batch, -1),
            places.expand(self.batch, self.kv_heads, -1),
        ).expand(self.batch, self.heads, total, total)
        shared = self.shared_by(kv_head)
        return Head(
            k=k,
            w=w,
            sinks=min(k, self.config.sinks),
            scale=self.scale,
            slope=[float(self.slopes[h]) if self.alibi else 0.0 for h in shared],
            noise=[lambda q, i, h=h: float(zeta[row, h, q, i]) for h in shared],
            new_positions=self.config.positions == "new",
            rotates=self.rotates,
            damping=self.config.damping,
            forgetting=self.config.forgetting,
            age_power={"sum": 0.0, "mean": 1.0}.get(self.config.normalize, self.config.normalize),
            frozen=self.config.key_set == "frozen",
            dilation=self.config.dilation,
            scored=self.config.recent < 100,
        )


def rotary(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """oracle.rotate of every vector, on tensors."""
    pairs = torch.arange(0, x.shape[-1], 2, device=x.device)
    angles = places[..., None] * 10000 ** (-pairs / x.shape[-1])
    turn = torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
