"""The one training loop against plain PyTorch, and everything that can stop it."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.errors import ConfigError, DataError, Diverged
from hf_purify.loop import Batches, TrainConfig, steps_of, train, trainable
from hf_purify.task import Task, mode, reading


class Rows:
    """Vectors with labels: the smallest `Examples`."""

    lengths = None

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, i: int) -> Tensor:
        return self.x[i]

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"x": self.x[indices], "labels": self.labels[indices]}


class Plain:
    """The smallest adapter."""

    at_once = 256

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
        if "partner" in batch:
            loss = batch["share"] * loss + (1 - batch["share"]) * F.cross_entropy(model(batch["x"]), batch["partner"], reduction="none")
        return loss

    def read(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.logits(model, batch)
        return logits.argmax(-1), batch["labels"], F.cross_entropy(logits, batch["labels"], reduction="none")

    def mix(self, batch: dict[str, Tensor], partner: Tensor, share: Tensor) -> dict[str, Tensor]:
        x = share * batch["x"] + (1 - share) * batch["x"][partner]
        return {"x": x, "labels": batch["labels"], "partner": batch["labels"][partner], "share": share}

    def augment(self, batch: dict[str, Tensor], generator: torch.Generator, kind: str) -> dict[str, Tensor]:
        return {**batch, "x": batch["x"] + torch.randn(batch["x"].shape, generator=generator)}


def task(**changes: Any) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    data = Rows(torch.randn(10, 4), torch.arange(10) % 3)
    made = Task(model, Plain(), data, torch.Generator().manual_seed(5), Accelerator(cpu=True))  # type: ignore[arg-type]
    return dataclasses.replace(made, **changes)


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def test_sgd_equals_a_plain_loop_bit_for_bit() -> None:
    made = task()
    model = copy.deepcopy(made.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.02)
    generator, losses, order = torch.Generator().manual_seed(5), [], []
    for _ in range(7):
        if not order:
            order = list(torch.randperm(10, generator=generator).split(4))
        batch = made.data.batch(order.pop(0))
        loss = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none").mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:  # the closed form: the scheduler's recursion rounds differently
            group["lr"] = 0.1 * (0.2 + 0.8 * (1 + math.cos(math.pi * len(losses) / 7)) / 2)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    config = TrainConfig(steps=7, batch_size=4, lr=0.1, lr_end=0.02, weight_decay=0.01, schedule="cosine", clip=0.5)
    history = train(made, made.model.parameters(), config)
    assert same(made.model, model)
    assert history.losses == losses
    assert history.steps == 7


def test_adamw_with_mixup_equals_a_plain_loop_bit_for_bit() -> None:
    made = task()
    model = copy.deepcopy(made.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        rows = torch.randint(10, (6,), generator=generator)
        share = torch.rand((), generator=generator)
        partner = torch.randperm(6, generator=generator)
        x, y = made.data.x[rows], made.data.labels[rows]
        logits = model(share * x + (1 - share) * x[partner])
        loss = (
            share * F.cross_entropy(logits, y, reduction="none") + (1 - share) * F.cross_entropy(logits, y[partner], reduction="none")
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.adapter.loss = lambda m, b: _once(m, b)  # type: ignore[method-assign]
    config = TrainConfig(steps=5, batch_size=6, replacement=True, optimizer="adamw", lr=0.01, weight_decay=0.1, mixup=True)
    train(made, made.model.parameters(), config)
    assert same(made.model, model)


def _once(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mixed loss with one forward pass, so that running statistics move once."""
    logits = model(batch["x"])
    parts = [F.cross_entropy(logits, batch[k], reduction="none") for k in ("labels", "partner")]
    return batch["share"] * parts[0] + (1 - batch["share"]) * parts[1]


def test_only_the_chosen_parameters_move() -> None:
    made = task()
    before = copy.deepcopy(made.model)
    made.model[0].bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in made.model.named_parameters()}
    train(made, [made.model[3].weight], TrainConfig(steps=2, batch_size=4, lr=0.5, mode="eval"))
    changed = [k for k, v in before.state_dict().items() if not torch.equal(v, made.model.state_dict()[k])]
    assert changed == ["3.weight"]
    assert {n: p.requires_grad for n, p in made.model.named_parameters()} == flags
    assert all(p.grad is None for p in made.model.parameters())


def test_ascent_climbs_and_the_clip_bounds_it() -> None:
    made = task()
    before = copy.deepcopy(made.model)
    first = _loss(made)
    train(
        made, made.model.parameters(), TrainConfig(steps=1, batch_size=10, lr=0.5, momentum=0.0, ascend=True, clip=0.01, mode="frozen_norm")
    )
    moved = torch.cat([(a - b).flatten() for a, b in zip(made.model.parameters(), before.parameters(), strict=True)]).norm()
    assert float(moved.detach()) == pytest.approx(0.5 * 0.01, rel=1e-3), "one step is rate times clipped norm"
    assert _loss(made) > first


def _loss(made: Task) -> float:
    made.model.eval()
    with torch.no_grad():
        return float(made.loss(made.data.batch(torch.arange(10))).mean())


@pytest.mark.parametrize("kind", ["train", "eval", "frozen_norm"])
def test_modes_are_kept_while_training_and_restored(kind: str) -> None:
    made = task()
    made.model.eval()
    made.model[3].train()
    seen: list[tuple[bool, bool]] = []
    made.model[1].register_forward_hook(lambda m, *_: seen.append((m.training, made.model.training)))
    statistics = made.model[1].running_mean.clone()
    train(made, made.model.parameters(), TrainConfig(steps=2, batch_size=5, mode=kind))
    assert set(seen) == {(kind == "train", kind != "eval")}
    assert torch.equal(made.model[1].running_mean, statistics) == (kind != "train")
    assert [m.training for m in made.model] == [False, False, False, True]


def test_modes_and_flags_are_restored_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()

    def fail() -> None:
        with mode(model, "train"), trainable(model, [model[0].weight]):
            assert model.training
            assert not model[1].weight.requires_grad
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not any(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("step", [1, 3])
def test_nan_stops_at_the_step_that_made_it(step: int) -> None:
    made, calls = task(), [0]
    plain = made.adapter.loss

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls[0] += 1
        return plain(model, batch) * (float("nan") if calls[0] >= step else 1)

    made.adapter.loss = loss  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=f"unlearn: the loss became nan at step {step};"):
        train(made, made.model.parameters(), TrainConfig(steps=6, batch_size=4), title="unlearn")
    assert calls[0] == step
    assert all(p.requires_grad and p.grad is None for p in made.model.parameters())


def test_infinity_is_a_divergence_too() -> None:
    made = task()
    with torch.no_grad():
        made.model[3].weight[0].fill_(float("inf"))
    with pytest.raises(Diverged, match=r"became (nan|inf) at step 1; lower the learning rate"):
        train(made, made.model.parameters(), TrainConfig(steps=2, batch_size=4))


def test_stop_ends_and_hooks_are_called_in_order() -> None:
    made, calls = task(), []
    history = train(
        made,
        made.model.parameters(),
        TrainConfig(steps=9, batch_size=4),
        after_backward=lambda _: calls.append("backward"),
        after_step=lambda step: calls.append(f"after {step}"),
        stop=lambda step: step == 2,
    )
    assert calls == ["backward", "after 1", "backward", "after 2"]
    assert history.steps == len(history.losses) == 2


def test_objective_stands_in_for_the_loss() -> None:
    made = task()
    head = made.model[3].weight
    history = train(
        made, [head], TrainConfig(steps=60, batch_size=5, lr=0.01), objective=lambda batch: head.square().sum() * len(batch["labels"])
    )
    assert history.losses[-1] < 1e-2 < history.losses[0]


def test_penalty_is_descended_in_ascent_too() -> None:
    made = task()
    head = made.model[3].weight
    before = float(head.detach().norm())
    config = TrainConfig(steps=20, batch_size=10, lr=0.01, momentum=0.0, ascend=True, mode="eval")
    history = train(made, [head], config, penalty=lambda: 10 * head.square().sum())
    assert float(head.detach().norm()) < 0.5 * before
    assert history.losses[0] == pytest.approx(_loss(task()), rel=1e-5), "the history shows the clean loss alone"


def test_batches_cover_every_epoch_and_replacement_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    stream = Batches(10, TrainConfig(epochs=1, batch_size=4), generator)
    for _ in range(2):
        epoch = [next(stream) for _ in range(3)]
        assert [len(b) for b in epoch] == [4, 4, 2]
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    drawn = next(Batches(3, TrainConfig(steps=1, batch_size=50, replacement=True), generator))
    assert len(drawn) == 50
    assert set(drawn.tolist()) == {0, 1, 2}


def test_steps_of_epochs() -> None:
    assert steps_of(10, TrainConfig(epochs=3, batch_size=4)) == 9
    assert steps_of(10, TrainConfig(steps=5, batch_size=4)) == 5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 10),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]),
        ({"schedule": "cosine", "lr_end": 0.4}, [0.4 + 0.6 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]),
        ({"schedule": "cosine", "schedule_every": 5}, [1.0] * 5 + [0.5] * 5),
        ({"schedule": "onecycle"}, [0.04, 0.52, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"schedule": "onecycle", "schedule_every": 5}, [0.04] * 5 + [0.625] * 5),
    ],
    ids=["constant", "cosine", "cosine to a floor", "in periods", "onecycle", "onecycle in periods"],
)
def test_schedules(settings: dict[str, Any], expected: list[float]) -> None:
    """With a constant gradient of 1 and plain SGD, each step shows its rate."""
    made = task()
    weight = made.model[3].bias
    rates, last = [], [weight.detach().clone()]

    def read(_: int) -> None:
        rates.append(float((last[0] - weight.detach())[0]))
        last[0] = weight.detach().clone()

    def flat(_: object) -> None:
        weight.grad = torch.ones_like(weight)

    config = TrainConfig(steps=10, batch_size=10, lr=1.0, momentum=0.0, **settings)
    train(made, [weight], config, after_backward=flat, after_step=read)
    assert rates == pytest.approx(expected, abs=1e-4)


def test_warm_up_starts_at_the_rate_of_torchs_onecycle() -> None:
    made = task()
    weight = made.model[3].bias
    reference = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([weight], lr=1.0), max_lr=0.5, total_steps=10)
    before = weight.detach().clone()
    config = TrainConfig(steps=1, batch_size=10, lr=0.5, momentum=0.0, schedule="onecycle")
    train(made, [weight], config, after_backward=lambda _: setattr(weight, "grad", torch.ones_like(weight)))
    torch.testing.assert_close(before - weight.detach(), torch.full_like(weight, reference.get_last_lr()[0]))


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_batch_in_parts_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Where no sample looks at another; a part is no smaller than a sample, and shares count."""
    whole, cut, seen = task(), task(), []
    cut.accumulate = parts
    monkeypatch.setattr(cut, "accelerator", Accelerator(cpu=True, gradient_accumulation_steps=2))  # as accelerate may have been told
    cut.model[0].register_forward_pre_hook(lambda _, x: seen.append(len(x[0])) if torch.is_grad_enabled() else None)
    config = TrainConfig(steps=5, batch_size=5, lr=0.1, mode="eval")
    histories = [train(t, t.model.parameters(), config, penalty=lambda t=t: t.model[3].weight.square().sum()) for t in (whole, cut)]
    torch.testing.assert_close(histories[0].losses, histories[1].losses, rtol=1e-5, atol=1e-6)
    for one, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert max(seen) == -(-5 // min(parts, 5))


def test_augmentation_is_used_in_training_alone() -> None:
    made = task(augmentation="noise")
    inputs: list[Tensor] = []
    made.model[0].register_forward_hook(lambda m, x, y: inputs.append(x[0].detach().clone()))
    train(made, made.model.parameters(), TrainConfig(steps=1, batch_size=10, lr=0.0))
    train(made, made.model.parameters(), TrainConfig(steps=1, batch_size=10, lr=0.0, augment=False))
    reading(made, made.data)
    known = made.data.x.sort(0).values
    assert [torch.equal(x.sort(0).values, known) for x in inputs] == [False, True, True]


def test_reading_is_in_order_and_leaves_the_mode() -> None:
    made = task()
    made.model.train()
    found, right, loss = reading(made, made.data, batch_size=3)
    assert made.model.training
    made.model.eval()
    with torch.no_grad():
        logits = made.model(made.data.x)
    assert torch.equal(found, logits.argmax(1))
    assert torch.equal(right, made.data.labels)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, right)), rel=1e-5)


def test_many_trainings_hold_no_memory() -> None:
    """accelerate keeps every optimizer that it prepares: unlearning, one training a step, would pile up hundreds."""
    made = task()
    for _ in range(3):
        train(made, made.model.parameters(), TrainConfig(steps=1, batch_size=4))
    assert not made.accelerator._optimizers


def test_no_data_is_an_error() -> None:
    made = task(data=Rows(torch.empty(0, 4), torch.empty(0, dtype=torch.long)))
    with pytest.raises(DataError, match="at least one clean sample"):
        train(made, made.model.parameters(), TrainConfig(steps=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either steps or epochs"),
        ({"steps": 1, "epochs": 1}, "give either steps or epochs"),
        ({"steps": 1, "optimizer": "sdg"}, "optimizer must be one of sgd, adamw; got 'sdg'"),
        ({"steps": 1, "schedule": "linear"}, "schedule must be one of"),
        ({"steps": 1, "mode": "frozen"}, "mode must be one of"),
        ({"steps": 1, "batch_size": 0}, "batch_size must be >= 1"),
        ({"steps": 1, "lr": -1.0}, "lr >= 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)
