"""How odd a model looks beside clean ones: what each signal's statistic is on models without a backdoor, as a recipe measured it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

from scipy import stats

from hf_purify.errors import ConfigError
from hf_purify.plain import checked

FORMAT = "hf-purify-calibration/1"
FILE = "calibration.json"


@dataclass(frozen=True)
class Null:
    """A statistic on clean models.

    Args:
        mean, std: of it.
        n: how many models it was seen on, at least 2.
    """

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Null:
        """
        Raises:
            ConfigError: fewer than two values, or none that differ.
        """
        if len(values) < 2 or stdev(values) == 0:
            raise ConfigError(f"a null distribution needs two clean models at least that differ, got {len(values)} values")
        return cls(fmean(values), stdev(values), len(values))

    def z(self, value: float) -> float:
        """Distance from the mean in standard deviations, as a further clean model would have it: the mean of a few models is not known well."""
        return (value - self.mean) / (self.std * math.sqrt(1 + 1 / self.n))

    def chance(self, value: float) -> float:
        """Share of further clean models whose statistic is as large, 0..1: Student's prediction from `n` normal values."""
        return float(stats.t.sf(self.z(value), self.n - 1))

    def value_at(self, chance: float) -> float:
        """The inverse of `chance`."""
        return self.mean + self.std * math.sqrt(1 + 1 / self.n) * float(stats.t.isf(chance, self.n - 1))


@dataclass(frozen=True)
class Calibration:
    """What clean models of a modality look like.

    Args:
        signals: signal -> its statistic on clean models.
        combined: of the largest `Null.z` over all signals.
        facts: how it was made and what it reached, for people: counts of models, rates with intervals.
    """

    signals: Mapping[str, Null]
    combined: Null
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, clean: Sequence[Mapping[str, float]], facts: Mapping[str, Any] | None = None) -> Self:
        """From the statistics of clean models, one mapping for each.

        The largest z of a model is taken with that model left out of the means, so that it is what a further model would show.
        """
        names = [name for name in clean[0] if all(name in found for found in clean)]
        signals = {name: Null.of([found[name] for found in clean]) for name in names}
        largest = []
        for i, found in enumerate(clean):
            others = [c for j, c in enumerate(clean) if j != i]
            largest.append(max(Null.of([c[name] for c in others]).z(found[name]) for name in names))
        return cls(signals, Null.of(largest), dict(facts or {}))

    def largest(self, statistics: Mapping[str, float]) -> float:
        """The largest z over the signals that a model has; of one that has none of them the mean of clean models."""
        found = [self.signals[name].z(value) for name, value in statistics.items() if name in self.signals]
        return max(found, default=self.combined.mean)

    def score(self, statistics: Mapping[str, float]) -> float:
        """One less the share of clean models that would look as suspicious, 0..1."""
        return 1 - self.combined.chance(self.largest(statistics))

    def line(self, name: str, score: float) -> float | None:
        """The value of a signal's statistic that alone gives this score; None of a signal that was not calibrated."""
        if name not in self.signals:
            return None
        null = self.signals[name]
        return null.mean + self.combined.value_at(1 - score) * null.std * math.sqrt(1 + 1 / null.n)

    @classmethod
    def beside(cls, file: str) -> Self | None:
        """The calibration that lies beside a module, if one does."""
        path = Path(file).with_name(FILE)
        return cls.read(path) if path.is_file() else None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            ConfigError: no calibration.
        """
        data = json.loads(path.read_text("utf-8"))
        if data.pop("format", None) != FORMAT:
            raise ConfigError(f"'{path.name}' is no calibration of format '{FORMAT}'")
        values = checked(cls, data, path.name)
        signals = {name: Null(**checked(Null, null, f"{path.name}.signals.{name}")) for name, null in values["signals"].items()}
        return cls(signals, Null(**checked(Null, values["combined"], f"{path.name}.combined")), values.get("facts", {}))
