"""Every method on every kind of network of every adapter: the promises of `Method`, kept whatever the method does inside."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import sys
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from shrunk import small
from torch import Tensor, nn

from hf_purify.adapter import Adapter
from hf_purify.errors import ConfigError
from hf_purify.method import Context, Sequential, Verdict
from hf_purify.neurons import get_tensor, owned
from hf_purify.registry import find, names

NETWORKS = [(adapter, variant) for adapter in names("adapter") for variant in find("adapter", adapter).variants]
PAIRS = [(method, *network) for method in names("method") for network in NETWORKS]
RECOVERING = [m for m in names("method") if "stand_ins(" in inspect.getsource(sys.modules[find("method", m).__module__])]
FORBIDDEN = ("trigger", "poison", "target", "attack", "backdoor", "asr", "victim", "test")

every = pytest.mark.parametrize(("method", "adapter", "variant"), PAIRS, ids=lambda v: str(v))


def context(adapter: str, variant: str) -> Context:
    """A random model in a state that a careless method would not leave: mixed modes, frozen parameters, a hook of the user's."""
    modality = find("adapter", adapter)()
    tiny = modality.tiny(variant)
    model, data = tiny.loaded.model, tiny.data
    index = modality.index(tiny.loaded, data.batch(torch.arange(2)))
    model.eval()
    list(model.modules())[-1].train()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(False)
    model.register_forward_hook(_seen)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return Context(model, modality, data, generator, Accelerator(cpu=True), "none", index, data, modality.outcomes(tiny.loaded))


def _seen(*_: object) -> None:
    """A hook that a user left on the model."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def circumstances(model: nn.Module) -> dict[str, Any]:
    """All that surrounds the weights: modes, gradients, hooks, parametrizations, parameter order."""
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": [n for n, p in model.named_parameters() if p.grad is not None],
        "hooks": {
            (n, attribute): list(value)
            for n, m in model.named_modules()
            for attribute, value in vars(m).items()
            if attribute.endswith("_hooks") and isinstance(value, dict)
        },
        "buffers": [n for n, _ in model.named_buffers()],
        "norm momenta": {n: m.momentum for n, m in model.named_modules() if hasattr(m, "momentum")},
    }


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


@dataclasses.dataclass
class Samples:
    """The clean samples: as the data set holds them, where they are no tensors, and all tensors made of them."""

    raws: list[Any]
    tensors: list[Tensor]


@dataclasses.dataclass
class Run:
    """What there was before and after one run."""

    ctx: Context
    verdict: Verdict
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    around: tuple[dict[str, Any], dict[str, Any]]
    samples: tuple[Samples, Samples]


@functools.cache
def ran(method: str, adapter: str, variant: str) -> Run:
    ctx = context(adapter, variant)
    before, around, samples = weights(ctx.model), circumstances(ctx.model), _samples(ctx)
    verdict = small(method)(ctx)
    return Run(ctx, verdict, before, weights(ctx.model), (around, circumstances(ctx.model)), (samples, _samples(ctx)))


def _samples(ctx: Context) -> Samples:
    raws = [copy.deepcopy(ctx.data.raw(i)) for i in range(len(ctx.data))]
    batch = ctx.data.batch(torch.arange(len(ctx.data)))
    tensors = [*(r for r in raws if isinstance(r, Tensor)), *(v.clone() for v in batch.values()), ctx.data.labels.clone()]
    return Samples([r for r in raws if not isinstance(r, Tensor)], tensors)


@every
def test_verdict_speaks_of_every_neuron(method: str, adapter: str, variant: str) -> None:
    run = ran(method, adapter, variant)
    neurons = (len(run.ctx.index),)
    assert run.verdict.scores.shape == neurons
    assert run.verdict.mask.shape == neurons
    assert torch.isfinite(run.verdict.scores).all()
    assert ((run.verdict.mask >= 0) & (run.verdict.mask <= 1)).all()
    assert not run.verdict.scores.requires_grad
    assert not run.verdict.mask.requires_grad


@every
def test_checkpoint_keeps_keys_order_types_and_shapes(method: str, adapter: str, variant: str) -> None:
    run = ran(method, adapter, variant)
    assert [(k, v.dtype, v.shape) for k, v in run.after.items()] == [(k, v.dtype, v.shape) for k, v in run.before.items()]
    assert all(torch.isfinite(v).all() for v in run.after.values())


@every
def test_everything_around_the_weights_is_as_before(method: str, adapter: str, variant: str) -> None:
    before, after = ran(method, adapter, variant).around
    for what in before:
        assert after[what] == before[what], what


@every
def test_clean_samples_are_left_alone(method: str, adapter: str, variant: str) -> None:
    before, after = ran(method, adapter, variant).samples
    assert before.raws == after.raws
    assert before.tensors
    assert all(torch.equal(b, a) for b, a in zip(before.tensors, after.tensors, strict=True))


@every
def test_same_seed_same_weights(method: str, adapter: str, variant: str) -> None:
    first = ran(method, adapter, variant)
    ctx = context(adapter, variant)
    verdict = small(method)(ctx)
    assert equal(weights(ctx.model), first.after)
    assert torch.equal(verdict.mask, first.verdict.mask)
    assert torch.equal(verdict.scores, first.verdict.scores)


@every
def test_failure_midway_puts_everything_back(method: str, adapter: str, variant: str) -> None:
    """The forward pass fails halfway through; a method that needs none fails at its end."""
    ctx = context(adapter, variant)
    logits, calls = ctx.adapter.logits, [0]

    def counted(*args: Any) -> Tensor:
        calls[0] += 1
        return logits(*args)

    ctx.adapter.logits = counted  # type: ignore[method-assign]
    small(method)(ctx)
    fatal = calls[0] // 2 + 1

    ctx = context(adapter, variant)
    before, around = weights(ctx.model), circumstances(ctx.model)
    calls[0] = 0

    def failing(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == fatal:
            raise RuntimeError("lost power")
        return logits(*args)

    broken = small(method)
    if fatal == 1:
        work = broken.purify

        def purify(ctx: Context) -> Verdict:
            work(ctx)
            raise RuntimeError("lost power")

        broken.purify = purify  # type: ignore[method-assign]
    else:
        ctx.adapter.logits = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost power"):
        broken(ctx)
    assert equal(weights(ctx.model), before)
    after = circumstances(ctx.model)
    for what in around:
        assert after[what] == around[what], what


@pytest.mark.parametrize(("adapter", "variant"), NETWORKS, ids=lambda v: str(v))
def test_methods_run_one_after_another_and_again(adapter: str, variant: str) -> None:
    ctx = context(adapter, variant)
    keys = list(ctx.model.state_dict())
    methods = names("method")
    for name in [*methods, *methods[:1]]:
        verdict = small(name)(ctx)
        assert torch.isfinite(verdict.scores).all(), name
        assert list(ctx.model.state_dict()) == keys, name


@every
def test_removed_neurons_stay_removed_in_a_sequence(method: str, adapter: str, variant: str) -> None:
    ctx = context(adapter, variant)
    sequence = Sequential([find("method", "random_mask")(share=0.3), small(method)])
    verdict = sequence(ctx)
    gone = verdict.mask == 0
    assert gone.any()
    assert ctx.removed is None
    for group, flags in zip(ctx.index, gone.split(ctx.index.sizes), strict=True):
        gate = owned(get_tensor(ctx.model, group.gate.param).detach(), group.gate, group.size)
        assert not gate[flags].any(), group.name


@pytest.mark.parametrize("method", RECOVERING)
def test_method_that_recovers_triggers_refuses_models_that_have_no_stand_ins(method: str) -> None:
    ctx = context("vision", "resnet")
    ctx.adapter.stand_ins = functools.partial(Adapter.stand_ins, ctx.adapter)  # type: ignore[method-assign]
    before, around = weights(ctx.model), circumstances(ctx.model)
    with pytest.raises(ConfigError, match=r"triggers cannot be recovered for .*: choose a method that does without"):
        small(method)(ctx)
    assert equal(weights(ctx.model), before)
    assert circumstances(ctx.model) == around


def test_some_method_recovers_triggers() -> None:
    """Else the list above would be empty."""
    assert RECOVERING


def test_context_holds_nothing_of_the_attack() -> None:
    fields = [f.name for f in dataclasses.fields(Context)]
    assert "data" in fields
    assert not [f for f in fields if any(word in f for word in FORBIDDEN)]


@pytest.mark.parametrize("method", names("method"))
def test_settings_are_frozen_and_typos_are_errors(method: str) -> None:
    made = small(method)
    assert made.name == method
    for field in dataclasses.fields(made.config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made.config, field.name, None)
    with pytest.raises(ConfigError, match=f"{method} has no option 'no_such_setting'"):
        find("method", method)(no_such_setting=1)


NUMBERS = [
    (name, f.name) for name in names("method") for f in dataclasses.fields(find("method", name).config_class) if type(f.default) is float
]
COUNTS = [
    (name, f.name)
    for name in names("method")
    for f in dataclasses.fields(find("method", name).config_class)
    if f.name.endswith(("steps", "epochs", "batch_size")) or f.name in ("lr", "unlearn_lr")
]


@pytest.mark.parametrize(("method", "option"), NUMBERS)
def test_no_setting_is_nan(method: str, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        find("method", method)(**{option: math.nan})


@pytest.mark.parametrize(("method", "option"), COUNTS)
@pytest.mark.parametrize("value", [0, -1])
def test_rates_and_counts_are_positive(method: str, option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{option} must be .*, got {value}"):
        find("method", method)(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"), [("errors", 2), ("cut", 0), ("follow", 0), ("copies", 0), ("share", 0), ("max_loss", -1), ("momentum", 1)]
)
def test_ranges_of_neural_cleanse(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{option}.*, got .*{value}"):
        find("method", "neural_cleanse")(**{option: value})
