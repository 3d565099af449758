"""Pure figures about a repair: clean accuracy, ASR, robust accuracy, DER, Wilson interval, McNemar's test.

The modules under `hub_cards/metrics` are thin `evaluate` shells over these functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from hf_purify.errors import ConfigError


def wilson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson, JASA 1927).

    >>> tuple(round(x, 3) for x in wilson(0, 100))
    (0.0, 0.037)
    """
    if n <= 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p, zz = hits / n, z * z
    center = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return (0.0 if hits == 0 else max(0.0, center - half)), (1.0 if hits == n else min(1.0, center + half))


@dataclass(frozen=True)
class Proportion:
    """`hits` of `n`, with its 95 % Wilson interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share in 0..1; NaN where there was nothing to count."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits, self.n)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {"hits": self.hits, "n": self.n, "value": None if self.n == 0 else self.value, "low": low, "high": high}

    def __str__(self) -> str:
        if not self.n:
            return "nothing to count (n=0)"
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n={self.n})"


def _aligned(*values: Tensor) -> list[Tensor]:
    """The values as tensors, all of one shape `(n,)`."""
    tensors = [torch.as_tensor(v) for v in values]
    if any(t.dim() != 1 or t.shape != tensors[0].shape for t in tensors):
        raise ConfigError(
            f"expected one value per sample, all of the same length; got shapes {', '.join(str(tuple(t.shape)) for t in tensors)}"
        )
    return tensors


def _count(hits: Tensor) -> Proportion:
    return Proportion(int(hits.sum()), int(hits.numel()))


def clean_accuracy(predictions: Tensor, labels: Tensor) -> Proportion:
    """Share of clean samples `(n,)` classified as labelled."""
    predictions, labels = _aligned(predictions, labels)
    return _count(predictions == labels)


def attack_success_rate(predictions: Tensor, labels: Tensor, targets: Tensor) -> Proportion:
    """Share of triggered samples classified as the attacker's target; samples of the target class do not count.

    Args:
        predictions: `(n,)` classes predicted for triggered samples.
        labels: `(n,)` their true classes.
        targets: `(n,)` the class that the attacker wants for each.
    """
    predictions, labels, targets = _aligned(predictions, labels, targets)
    other = labels != targets
    return _count(predictions[other] == targets[other])


def robust_accuracy(predictions: Tensor, labels: Tensor, targets: Tensor) -> Proportion:
    """Share of triggered samples of other classes that are classified as their true class."""
    predictions, labels, targets = _aligned(predictions, labels, targets)
    other = labels != targets
    return _count(predictions[other] == labels[other])


def defense_effectiveness_rating(asr_before: float, asr_after: float, acc_before: float, acc_after: float) -> float:
    """DER in 0..1 (M. Zhu et al., ICCV 2023): what the attack lost, less what the clean accuracy lost.

    `(max(0, asr_before - asr_after) - max(0, acc_before - acc_after) + 1) / 2`; all figures in 0..1.

    >>> round(defense_effectiveness_rating(1.0, 0.02, 0.93, 0.91), 3)
    0.98
    """
    figures = (asr_before, asr_after, acc_before, acc_after)
    if any(f < 0 or f > 1 for f in figures):
        raise ConfigError(f"expected shares in 0..1, got {figures}; divide percentages by 100")
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2


def mcnemar(first: Tensor, second: Tensor, labels: Tensor) -> float:
    """Exact two-sided p-value that two models are right equally often on the same samples (Q. McNemar, 1947).

    Args:
        first, second: `(n,)` predictions of the two models.
        labels: `(n,)` true classes.
    """
    first, second, labels = _aligned(first, second, labels)
    right = [p == labels for p in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)
