"""Triggers, target rules and poisoned views: what an attacker does to data. Used by `implant` and `measure` alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_purify.adapter import Examples
from hf_purify.errors import ConfigError, unknown


class Trigger(Protocol):
    """A frozen dataclass: a pure, seeded transform of one raw example; no I/O, no global random state."""

    name: ClassVar[str]

    def __call__(self, example: Any, seed: int = 0) -> Any:
        """Return the triggered example, of the same type and shape. `seed` feeds triggers that vary from sample to sample."""


@dataclass(frozen=True)
class AllToOne:
    """Every sample of another class becomes class `target`."""

    target: int = 0
    name: ClassVar[str] = "all-to-one"

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """The class `(n,)` that the attacker wants for samples of these true classes."""
        return torch.full_like(labels, self.target)

    def candidates(self, labels: Tensor) -> Tensor:
        """Which training samples may be poisoned."""
        return labels != self.target


@dataclass(frozen=True)
class AllToAll:
    """Class `y` becomes `(y + 1) mod K`."""

    name: ClassVar[str] = "all-to-all"

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        return (labels + 1) % classes

    def candidates(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)


@dataclass(frozen=True)
class CleanLabel(AllToOne):
    """Only samples of the target class carry the trigger in training, with their true label."""

    name: ClassVar[str] = "clean-label"

    def candidates(self, labels: Tensor) -> Tensor:
        return labels == self.target


RULES = {rule.name: rule for rule in (AllToOne, AllToAll, CleanLabel)}


def make_rule(name: str, target: int = 0, classes: int | None = None) -> AllToOne | AllToAll:
    """Build a target rule by name.

    Raises:
        UnknownName: no such rule.
        ConfigError: the target class does not exist.
    """
    if name not in RULES:
        raise unknown("target rule", name, RULES)
    if name == AllToAll.name:
        return AllToAll()
    if classes is not None and not 0 <= target < classes:
        raise ConfigError(f"target class must be in 0..{classes - 1}, got {target}")
    return CleanLabel(target) if name == CleanLabel.name else AllToOne(target)


@dataclass(frozen=True)
class Poisoned:
    """A lazy view on a data set in which some samples carry a trigger.

    Args:
        examples: the view; its labels are the attacker's where a sample is poisoned.
        labels: `(n,)` true classes.
        targets: `(n,)` the attacker's wish for each sample.
        triggered: `(n,)` which samples carry the trigger.
        rows: `(n,)` their positions in the data set that was looked at.
    """

    examples: Examples
    labels: Tensor
    targets: Tensor
    triggered: Tensor
    rows: Tensor


def poison(
    data: Examples, trigger: Trigger, rule: AllToOne | AllToAll, classes: int, rate: float, seed: int = 0, cover: float = 0.0
) -> Poisoned:
    """Poison a share `rate` of a training set.

    Args:
        rate: share of all samples, in (0, 1]; where the rule allows fewer samples, all those are taken.
        cover: samples that carry the trigger's `cover` transform with their true label, per poisoned one (WaNet's noise
            mode takes 2); only for triggers that have one.
    """
    if not 0 < rate <= 1:
        raise ConfigError(f"poison rate must be in (0, 1], got {rate}")
    labels = data.labels
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    allowed = order[rule.candidates(labels)[order]]
    if not len(allowed):
        raise ConfigError(f"the rule '{rule.name}' leaves no sample to poison: the training data holds no sample of a class that it allows")
    chosen = allowed[: max(1, round(rate * len(data)))]
    targets = rule.targets(labels, classes)
    view = data.overlay(chosen, trigger, targets[chosen], seed)
    if cover and hasattr(trigger, "cover"):
        rest = order[~torch.isin(order, chosen)][: round(cover * len(chosen))]
        view = view.overlay(rest, trigger.cover, labels[rest], seed)
    triggered = torch.zeros(len(data), dtype=torch.bool)
    triggered[chosen] = True
    return Poisoned(view, labels, targets, triggered, torch.arange(len(data)))


def trigger_all(data: Examples, trigger: Trigger, rule: AllToOne | AllToAll, classes: int, seed: int = 0) -> Poisoned:
    """Put the trigger on every sample that is not of its target class already: the set on which ASR is measured."""
    targets = rule.targets(data.labels, classes)
    chosen = (targets != data.labels).nonzero().flatten()
    view = data.select(chosen).overlay(torch.arange(len(chosen)), trigger, data.labels[chosen], seed)
    return Poisoned(view, data.labels[chosen], targets[chosen], torch.ones(len(chosen), dtype=torch.bool), chosen)
