"""Rules that look at keys alone, so that what nobody has asked for yet can stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from keyformer.rules.rule import Candidates, Rule

RIDGE = 1e-4
"""Of the mean eigenvalue: what is added to each, where keys span less than their space."""


@dataclass(frozen=True)
class KeyDiversity(Rule):
    """KeyDiff's rule (arXiv 2504.15364): keys unlike the mean direction of all stay."""

    def score(self, tokens: Candidates) -> Tensor:
        """1 - the cosine of key and mean direction."""
        directions = normalize(tokens.keys, dim=-1) * tokens.there[..., None]
        mean = normalize(directions.sum(dim=2, keepdim=True), dim=-1)
        return 1 - (directions * mean).sum(dim=-1)


@dataclass(frozen=True)
class Leverage(Rule):
    """Leverage scores of the keys, as in Compactor (arXiv 2507.08143): the outliers stay.

    Of the centred keys K it is the diagonal of K (K^T K + e I)^-1 K^T, the exact one.
    """

    def score(self, tokens: Candidates) -> Tensor:
        """How far a key is from what the others could be combined to, in [0, 1)."""
        there = tokens.there[..., None]
        count = there.sum(dim=2, keepdim=True).clamp(min=1)
        mean = (tokens.keys * there).sum(dim=2, keepdim=True) / count
        keys = (tokens.keys - mean) * there
        covariance = keys.transpose(2, 3) @ keys
        head_dim = keys.shape[-1]
        ridge = RIDGE * covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        ridge = ridge.clamp(min=torch.finfo(torch.float32).tiny)[..., None, None]
        factor = torch.linalg.cholesky(covariance + ridge * torch.eye(head_dim).to(keys))
        whitened = torch.linalg.solve_triangular(factor, keys.transpose(2, 3), upper=False)
        return whitened.square().sum(dim=2)
