"""A repair method: its author writes `purify(ctx) -> Verdict`, the base class does everything around it."""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final, get_type_hints

import torch
from torch import Tensor, nn

from hf_purify.adapter import Examples
from hf_purify.errors import ConfigError, ModelError, checked_type, did_you_mean
from hf_purify.loop import TrainConfig
from hf_purify.masks import bake, masked
from hf_purify.neurons import NeuronIndex
from hf_purify.sharding import Original, is_sharded, local
from hf_purify.task import Task, put_back, reading, snapshot


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a method, saved beside its result. Subclasses add fields with defaults.

    Rates (`lr`, `..._lr`), counts (`steps`, `epochs`, `batch_size`, `..._steps`), `momentum` and `weight_decay` are checked here for
    all of them, and so are types.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, given in list(vars(self).items()):
            value = checked_type(name, given, hints[name])
            object.__setattr__(self, name, value)
            word = name.rsplit("_", 1)[-1]
            if value is None:
                continue
            if isinstance(value, float) and math.isnan(value):
                raise ConfigError(f"{name} is not a number")
            if word == "lr" and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {value}")
            if (word in ("steps", "epochs") or name == "batch_size") and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
            if name == "momentum" and not 0 <= value < 1:
                raise ConfigError(f"momentum must be in [0, 1), got {value}")
            if name == "weight_decay" and not 0 <= value < math.inf:
                raise ConfigError(f"weight_decay must be a number that is not negative, got {value}")


@dataclass(frozen=True)
class Verdict:
    """What a method decided.

    Args:
        scores: `(N,)` suspicion of each neuron, higher = more suspicious.
        mask: `(N,)` in [0, 1]; folded into the weights afterwards. Ones where a method changed the weights instead.
        folded: the method folded the mask into the weights itself (and trained them afterwards).
        notes: what was chosen, for the report.
        curve: rows of `threshold`, `removed`, `held_out_accuracy`, where a threshold was chosen from a sweep.
    """

    scores: Tensor
    mask: Tensor
    folded: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Training:
    """One training of a method, as it is planned before there are data: what an estimate of memory and time is made from.

    Args:
        train: what the loop is told.
        mask: the neurons of the mask that is learned while all weights are frozen; None where all weights are learned.
        level: where the mask acts; see `masks.masked`.
    """

    train: TrainConfig
    mask: NeuronIndex | None = None
    level: str = "activation"


@dataclass(frozen=True)
class Finding:
    """What a scan found of the model, for a method to begin with.

    Args:
        targets: the classes that a backdoor seems to lead to.
        kind: of the triggers that do, one of the adapter's `stand_ins`.
        neurons: `(N,)` which ones are suspected.
    """

    targets: tuple[int, ...]
    kind: str
    neurons: Tensor


@dataclass
class Context(Task):
    """All that a method may see: a model, its neurons, and clean data. There is no field for poisoned data.

    Args:
        index: all neurons of the model.
        held_out: clean samples that the method does not learn from; every threshold, stop and count is chosen on them.
        classes: number of classes; of a model that answers freely, the answers that each row of its logits chooses among.
        removed: `(N,)` neurons that an earlier method of a sequence removed and that must stay so.
        original: a frozen copy of the model from before the first method of a sequence, in eval mode.
        finding: what a scan found; None where there was none, or nothing was suspicious.
    """

    index: NeuronIndex = field(default_factory=lambda: NeuronIndex(()))
    held_out: Examples | None = None
    classes: int = 0
    removed: Tensor | None = None
    original: nn.Module | None = None
    finding: Finding | None = None

    @property
    def judged(self) -> Examples:
        """The samples that choices are made on: those held out, or the defence set itself where there are too few."""
        return self.held_out if self.held_out is not None and len(self.held_out) else self.data

    def accuracy(self, mask: Tensor | None = None) -> float:
        """Held-out clean accuracy of the model as it is, or under a mask over the whole index."""
        if mask is None:
            found, answers, _ = self.reading()
            return float((found == answers).float().mean())
        with masked(self.model, self.index, mask.to(self.device)):
            return self.accuracy()

    def reading(self) -> tuple[Tensor, Tensor, float]:
        """What is said on held-out samples, what should be, `(rows,)` each, and the mean clean loss of the model as it is, in eval mode."""
        return reading(self, self.judged)

    def neurons(self, granularity: str = "auto") -> NeuronIndex:
        """The neurons that masks and prunings act on.

        `auto`: the batch norm channels of a network that has them, else hidden units and attention values. The stem, the
        head and norms of a residual stream are left out.
        """
        norms = self.index.where(role="norm")
        batch_norms = NeuronIndex(tuple(g for g in norms if _has_statistics(self.model, g.module)), self.index.keys)
        chosen = batch_norms if len(batch_norms) else self.index.where(role=("hidden", "attention"))
        chosen = chosen.where(blocks=True)
        if granularity != "auto":
            chosen = self.index.where(role=granularity)
        if not len(chosen):
            raise ModelError(f"no neurons of kind '{granularity}' in this model; it has {', '.join(sorted({g.role for g in self.index}))}")
        return chosen

    def teacher(self) -> nn.Module:
        """A frozen copy of the original model, in eval mode: its own predictions on clean samples are worth keeping."""
        if self.original is not None:
            return self.original
        return Original(self.model) if is_sharded(self.model) else copy.deepcopy(self.model).eval().requires_grad_(False)

    @contextmanager
    def copy(self) -> Iterator[None]:
        """Work on the model in place; parameters and buffers are put back afterwards."""
        state = snapshot(self.model)
        try:
            yield
        finally:
            put_back(self.model, state)


def _has_statistics(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(model.get_submodule(name), "running_mean", None), Tensor)


class Method(ABC):
    """Base class of all methods. `name` is the file's name."""

    name: ClassVar[str]
    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    control: ClassVar[bool] = False  # shown beside every repair, never recommended
    trains: ClassVar[bool] = False  # moves weights themselves, so that its mask is not the whole repair
    spreads: ClassVar[bool] = True  # works on models that are spread over processes
    begins: ClassVar[str] = ""  # what the method takes of a scan's finding, in words; nothing where it is empty

    def __init__(self, config: MethodConfig | None = None, **options: Any) -> None:
        names = {f.name for f in dataclasses.fields(self.config_class)}
        for option in options:
            if option not in names:
                listed = ", ".join(sorted(names)) or "none"
                raise ConfigError(f"{self.name} has no option '{option}'{did_you_mean(option, names)} (options: {listed})")
        self.config = dataclasses.replace(config or self.config_class(), **options)

    @abstractmethod
    def purify(self, ctx: Context) -> Verdict:
        """Repair `ctx.model`, or say by a mask how to; use clean data only."""

    def plan(self, ctx: Context) -> Training:
        """The training that the method is, told before it runs; `ctx` has model and index, and no data.

        Raises:
            ConfigError: the method is more than one training, or decides on the way what it trains.
        """
        raise ConfigError(
            f"{self.name} decides on the way how it trains, so that its cost is not known beforehand; its card names it: hf-purify show {self.name}"
        )

    @final
    def __call__(self, ctx: Context) -> Verdict:
        """Run the method, check what it says, fold its mask into the weights, and leave the model as it was otherwise.

        Train and eval modes, `requires_grad` and hooks are those from before, also after an exception; weights after an
        exception are those from before too.
        """
        if not self.spreads and is_sharded(ctx.model):
            raise ModelError(f"{self.name} looks at weights neuron by neuron, and the model is spread over processes: launch without FSDP")
        modules = list(ctx.model.modules())
        modes = [m.training for m in modules]
        hooks = [_hooks(m) for m in modules]
        flags = {n: p.requires_grad for n, p in ctx.model.named_parameters()}
        state = snapshot(ctx.model)  # on the host: a model as large as its device needs no second copy there
        try:
            verdict = self.purify(ctx)
            self._check(ctx, verdict)
            if not verdict.folded:
                bake(ctx.model, ctx.index, verdict.mask.to(ctx.device))
            _check_weights(ctx.model, self.name)
        except BaseException:
            put_back(ctx.model, state)
            raise
        finally:
            for module, training, before in zip(modules, modes, hooks, strict=True):
                module.training = training
                for current, kept in zip(_hooks(module), before, strict=True):
                    for key in set(current) - set(kept):
                        del current[key]
            for n, p in ctx.model.named_parameters():
                p.requires_grad_(flags.get(n, False))
                p.grad = None
        return dataclasses.replace(verdict, scores=verdict.scores.detach().float().cpu(), mask=verdict.mask.detach().float().cpu())

    def _check(self, ctx: Context, verdict: Verdict) -> None:
        for what, value in (("scores", verdict.scores), ("mask", verdict.mask)):
            ctx.index.check(value)
            if not torch.isfinite(value).all():
                raise ModelError(f"{self.name}: {what} must be finite, got {int((~torch.isfinite(value)).sum())} values that are not")
        if float(verdict.mask.min()) < 0 or float(verdict.mask.max()) > 1:
            raise ModelError(
                f"{self.name}: mask values must lie in [0, 1], got {float(verdict.mask.min()):.3g}..{float(verdict.mask.max()):.3g}"
            )

    @classmethod
    def card(cls) -> str:
        """The method's card: the Markdown file beside its module."""
        import importlib

        file = importlib.import_module(cls.__module__).__file__
        path = Path(file).with_suffix(".md") if file else None
        return path.read_text("utf-8") if path and path.is_file() else (cls.__doc__ or "")


def _hooks(module: nn.Module) -> list[dict]:
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]


def _check_weights(model: nn.Module, name: str) -> None:
    bad = next((n for n, p in model.state_dict().items() if p.is_floating_point() and not torch.isfinite(local(p)).all()), None)
    if bad:
        raise ModelError(f"{name} left NaN or infinite values in '{bad}'; the model was put back. Lower the learning rate")


class Sequential(Method):
    """Methods one after the other; neurons that one removes stay removed in those after it.

    Reference: none; a composition of methods.
    """

    name = "sequential"

    def __init__(self, methods: list[Method]) -> None:
        if not methods:
            raise ConfigError("a sequence needs at least one method")
        super().__init__()
        self.methods = methods
        self.name = "+".join(m.name for m in methods)  # type: ignore[misc]
        self.trains = any(m.trains for m in methods)  # type: ignore[misc]

    def purify(self, ctx: Context) -> Verdict:
        mask = torch.ones(len(ctx.index))
        notes: dict[str, Any] = {}
        curve: tuple[dict[str, float], ...] = ()
        scores = torch.zeros(len(ctx.index))
        before = ctx.removed, ctx.original
        ctx.original = ctx.teacher()
        try:
            for method in self.methods:
                verdict = method(ctx)
                mask = mask * verdict.mask
                scores = scores if scores.any() else verdict.scores
                notes |= {f"{method.name}.{k}": v for k, v in verdict.notes.items()}
                curve = curve or verdict.curve
                ctx.removed = mask == 0
        finally:
            ctx.removed, ctx.original = before
        return Verdict(scores, mask, folded=True, notes=notes, curve=curve)
