"""A line of a report's table: a model and how it fared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_purify.errors import ConfigError, did_you_mean
from hf_purify.plain import checked

if TYPE_CHECKING:
    from hf_purify.metrics import Proportion

KINDS = ("unrepaired", "method", "control", "oracle", "other")


@dataclass
class Row:
    """One line of the table: a model and how it fared.

    Args:
        name: `none`, or the name of the method or control.
        kind: `unrepaired`, `method`, `control`, `oracle` (chosen with the trigger known) or `other`.
        clean_accuracy: on clean test samples.
        asr: attack success rate by trigger name; empty where no trigger is known.
        robust_accuracy: share of triggered samples given their true label, by trigger name.
        der: defense effectiveness rating in 0..1 by trigger name; empty in the unrepaired row.
        seconds: wall time of the repair.
        notes: what else is known: the chosen threshold, where it stopped, `mcnemar_p` against the unrepaired model.
        utility: other figures on clean test samples by name, such as BLEU.
    """

    name: str
    kind: str
    clean_accuracy: Proportion | None = None
    asr: dict[str, Proportion] = field(default_factory=dict)
    robust_accuracy: dict[str, Proportion] = field(default_factory=dict)
    der: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    utility: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"row '{self.name}': unknown kind '{self.kind}'{did_you_mean(self.kind, KINDS)} (known: {', '.join(KINDS)})")

    @property
    def label(self) -> str:
        """The name, with the kind where it is not an ordinary method."""
        return self.name if self.kind in ("method", "other") else f"{self.name} ({self.kind})"

    @classmethod
    def from_dict(cls, data: Any, where: str = "row") -> Row:
        values = checked(cls, data, where)
        if values.get("clean_accuracy") is not None:
            values["clean_accuracy"] = read_proportion(values["clean_accuracy"], f"{where}.clean_accuracy")
        for key in ("asr", "robust_accuracy"):
            values[key] = {name: read_proportion(p, f"{where}.{key}.{name}") for name, p in values.get(key, {}).items()}
        return cls(**values)


def read_proportion(data: Any, where: str) -> Proportion:
    """A proportion that was written as JSON; what follows from its counts is not read.

    Raises:
        ConfigError: it is none, or counts more hits than samples.
    """
    from hf_purify.metrics import Proportion

    derived = ("value", "low", "high")
    counts = {k: v for k, v in data.items() if k not in derived} if isinstance(data, Mapping) else data
    proportion = Proportion(**checked(Proportion, counts, where))
    if not 0 <= proportion.hits <= proportion.n:
        raise ConfigError(f"{where}: expected 0 <= hits <= n, got hits={proportion.hits}, n={proportion.n}")
    return proportion
