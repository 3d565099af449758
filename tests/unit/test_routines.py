"""Unlearning that controls itself, masks that keep to their floors, relearning that keeps what was removed, resets that touch no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_task import CLASSES, state, trained
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.discovery import discover
from hf_purify.loop import TrainConfig, train
from hf_purify.masks import MASK_NAME, bake
from hf_purify.neurons import get_tensor, owned
from hf_purify.routines import (
    forgetting_level,
    refresh_norms,
    relearn,
    reset_neurons,
    tune_mask,
    unlearn,
)
from hf_purify.task import Task, mode


def reader(task: Task) -> Any:
    def read() -> tuple[Tensor, Tensor, float]:
        task.model.eval()
        with torch.no_grad():
            batch = task.data.batch(torch.arange(len(task.data)))
            logits = task.model(batch["pixel_values"])
            return logits.argmax(1), batch["labels"], float(F.cross_entropy(logits, batch["labels"]))

    return read


@pytest.mark.parametrize(("classes", "level"), [(2, 0.5), (4, 0.5), (10, 0.2), (43, 1 / 43 + 0.05), (1000, 0.051)])
def test_forgetting_level_lies_above_chance(classes: int, level: float) -> None:
    assert forgetting_level(classes) == pytest.approx(level)
    assert classes == 2 or forgetting_level(classes) > 1 / classes


@pytest.mark.parametrize("lr", [0.001, 0.05, 5.0], ids=["far too small", "fitting", "far too large"])
def test_unlearning_stops_where_the_task_is_forgotten_and_no_further(lr: float) -> None:
    task, _ = trained()
    statistics = {k: v for k, v in state(task.model).items() if "running" in k}
    found = unlearn(task, reader(task), CLASSES, lr=lr, max_steps=200, config=TrainConfig(steps=1, batch_size=16))
    predictions, labels, loss = reader(task)()
    accuracy = float((predictions == labels).float().mean())
    assert found.accuracy == pytest.approx(accuracy)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    assert 1.1 / CLASSES <= accuracy <= forgetting_level(CLASSES) + 1e-5
    assert found.steps <= 200
    assert 0.25 <= found.majority <= 1
    after = state(task.model)
    assert all(torch.isfinite(v).all() for v in after.values())
    assert all(torch.equal(after[k], v) for k, v in statistics.items()), "running statistics stay those of the original"


def test_unlearning_keeps_to_its_bound_and_reports_that_it_did_not_arrive() -> None:
    task, _ = trained()
    found = unlearn(task, reader(task), CLASSES, lr=1e-6, max_steps=3, config=TrainConfig(steps=1, batch_size=16))
    assert found.steps == 3
    assert found.accuracy > forgetting_level(CLASSES)


@pytest.mark.parametrize("level", ["activation", "weight"])
def test_mask_stays_between_its_floor_and_one_and_weights_stay_as_they_are(level: str) -> None:
    task, index = trained()
    before = state(task.model)
    floor = index.per_group(torch.linspace(0.9, 0.2, len(index.groups)))
    config = TrainConfig(steps=15, batch_size=16, lr=5.0, mode="eval")
    mask = tune_mask(task, index, config, floor=floor, penalty=lambda m: m.sum(), level=level)
    assert mask.shape == (len(index),)
    assert not mask.requires_grad
    assert (mask >= floor).all()
    assert (mask <= 1).all()
    for name, part in index.split(mask).items():
        low = index.split(floor)[name]
        assert (part == low).any(), f"a rate this high reaches the floor of {name}"
    assert all(torch.equal(before[k], v) for k, v in state(task.model).items())
    assert MASK_NAME not in dict(task.model.named_parameters())


def test_mask_starts_where_it_is_told() -> None:
    task, index = trained()
    start = torch.linspace(0.1, 0.9, len(index))
    mask = tune_mask(task, index, TrainConfig(steps=1, batch_size=16, lr=0.0, mode="eval"), start=start)
    assert torch.equal(mask, start)
    assert start[0] == pytest.approx(0.1), "the caller's tensor is left alone"


def test_mask_alone_can_learn() -> None:
    task, index = trained()
    config = TrainConfig(steps=30, batch_size=64, lr=0.5, mode="eval")
    task.data.labels.fill_(2)  # a task that the model does not do yet
    before = reader(task)()[2]
    mask = tune_mask(task, index, config)
    with torch.no_grad():
        bake(task.model, index, mask)
    assert reader(task)()[2] < 0.7 * before


def test_relearning_keeps_removed_neurons_removed() -> None:
    task, index = trained()
    removed = torch.zeros(len(index), dtype=torch.bool)
    removed[::3] = True
    bake(task.model, index, (~removed).float())
    before, steps = state(task.model), []
    relearn(task, TrainConfig(steps=5, batch_size=16, lr=0.1), index=index, removed=removed, after_step=lambda s: steps.append(s))
    for group, gone in zip(index, removed.split(index.sizes), strict=True):
        gate = owned(get_tensor(task.model, group.gate.param).detach(), group.gate, group.size)
        assert not gate[gone].any(), group.name
        assert not torch.equal(gate[~gone], owned(before[group.gate.param], group.gate, group.size)[~gone]), "the others learn"
    assert steps == [1, 2, 3, 4, 5]


def test_relearning_without_removals_is_plain_training() -> None:
    first, index = trained()
    second, _ = trained()
    config = TrainConfig(steps=4, batch_size=16, lr=0.1)
    first.generator.manual_seed(1)
    second.generator.manual_seed(1)
    relearn(first, config, index=index, removed=torch.zeros(len(index), dtype=torch.bool))
    train(second, second.model.parameters(), config)
    assert all(torch.equal(v, state(second.model)[k]) for k, v in state(first.model).items())


def test_reset_touches_the_chosen_neurons_alone() -> None:
    task, index = trained()
    before = state(task.model)
    for i in range(0, len(index), 7):
        task.model.load_state_dict(before)
        chosen = torch.zeros(len(index), dtype=torch.bool)
        chosen[i] = True
        reset_neurons(task.model, index, chosen, torch.Generator().manual_seed(0))
        name, position = index.locate(i)
        (group,) = (g for g in index if g.name == name)
        after = state(task.model)
        mine = {p.param: owned(torch.ones_like(before[p.param], dtype=torch.bool), p, group.size) for p in group.params}
        for key, old in before.items():
            same = (after[key] == old).reshape(old.shape)
            if key not in mine:
                assert same.all(), key
                continue
            part = next(p for p in group.params if p.param == key)
            others = torch.arange(group.size) != position
            assert owned(same, part, group.size)[others].all(), key
            if old.dim() > 1:
                assert not owned(same, part, group.size)[position].all(), key


def test_channel_of_flattened_maps_is_reset_and_kept_removed_at_all_its_positions() -> None:
    task, _ = trained()
    torch.manual_seed(0)
    x = task.data.batch(torch.arange(2))["pixel_values"]
    task.model = nn.Sequential(nn.Conv2d(x.shape[1], 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * x[0, 0].numel(), 4))
    index = discover(task.model, lambda m: m(x), 4).where("3")
    width, head = x[0, 0].numel(), task.model[3].weight
    gone = torch.tensor([False, True, False])
    reset_neurons(task.model, index, gone, torch.Generator().manual_seed(0))
    relearn(task, TrainConfig(steps=3, batch_size=16, lr=0.1), index=index, removed=gone)
    assert (len(index), width > 1) == (3, True)
    assert (head.detach() == 0).all(0).tolist() == [False] * width + [True] * width + [False] * width


def test_reset_rows_are_drawn_within_their_bound_and_seeded() -> None:
    task, index = trained()
    chosen = torch.ones(len(index), dtype=torch.bool)
    reset_neurons(task.model, index, chosen, torch.Generator().manual_seed(0))
    conv = task.model[0].weight.detach()
    bound = (2 / (3 * 9)) ** 0.5
    assert conv.abs().max() <= bound
    assert conv.abs().max() > 0.9 * bound
    assert not task.model[7].bias.any()
    one = state(task.model)
    reset_neurons(task.model, index, chosen, torch.Generator().manual_seed(0))
    assert all(torch.equal(one[k], v) for k, v in state(task.model).items()), "seeded"


def test_reset_hidden_units_start_silent() -> None:
    task, index = trained()
    hidden = index.where("7", role="hidden")
    assert len(hidden) == 16
    chosen = index.embed(hidden, torch.ones(len(hidden)), fill=0.0).bool()
    reset_neurons(task.model, index, chosen, torch.Generator().manual_seed(0))
    assert not task.model[7].weight.any()
    assert task.model[5].weight.any()


def test_refreshed_statistics_are_plain_averages() -> None:
    task, _ = trained()
    norm, conv = task.model[1], task.model[0]
    momentum = norm.momentum
    before = state(task.model)
    assert refresh_norms(task, batch_size=16) == 1
    with torch.no_grad():
        outputs = [conv(task.data.batch(rows)["pixel_values"]) for rows in torch.arange(64).split(16)]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    variance = torch.stack([o.transpose(0, 1).flatten(1).var(1) for o in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, variance, atol=1e-5, rtol=1e-4)
    assert norm.momentum == momentum
    assert not norm.training
    changed = [k for k, v in state(task.model).items() if not torch.equal(before[k], v)]
    assert changed
    assert all(k.startswith("1.") and k not in ("1.weight", "1.bias") for k in changed)


def test_networks_without_norms_have_nothing_to_refresh() -> None:
    task, _ = trained()
    task.model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    before = state(task.model)
    assert refresh_norms(task) == 0
    assert all(torch.equal(before[k], v) for k, v in state(task.model).items())


def test_sharpness_step_equals_the_formula() -> None:
    """One SGD step with the gradient at `w + rho |w|^2 g / || |w| g ||`, written out with autograd alone."""
    task, _ = trained()
    config = TrainConfig(steps=1, batch_size=len(task.data), lr=0.1, momentum=0.0, mode="eval", augment=False)
    weights = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    batch = task.data.batch(torch.arange(len(task.data)))

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: w.clone().requires_grad_() for n, w in at.items()}
        logits = torch.func.functional_call(task.model, leaves, (batch["pixel_values"],))
        return dict(zip(leaves, torch.autograd.grad(F.cross_entropy(logits, batch["labels"]), list(leaves.values())), strict=True))

    task.model.eval()
    here = gradient(weights)
    norm = torch.cat([(weights[n].abs() * g).flatten() for n, g in here.items()]).norm()
    there = gradient({n: w + 2.0 * w.square() * here[n] / norm for n, w in weights.items()})
    relearn(task, config, sharpness=2.0)
    for name, value in task.model.named_parameters():
        torch.testing.assert_close(value.detach(), weights[name] - 0.1 * there[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(here[n], there[n], rtol=1e-3) for n in here)  # a plain step would not pass


def test_sharpness_keeps_statistics_of_the_perturbed_pass_out() -> None:
    """Running means after one step are those of one pass over the batch, not of two."""
    task, _ = trained()
    norm = task.model[1]
    before = norm.running_mean.clone()
    seen = task.model[0](task.data.batch(torch.arange(len(task.data)))["pixel_values"]).mean((0, 2, 3)).detach()
    relearn(task, TrainConfig(steps=1, batch_size=len(task.data), lr=0.01, augment=False), sharpness=2.0)
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * seen, rtol=1e-4, atol=1e-6)


def test_an_unlearning_stops_at_the_wanted_accuracy() -> None:
    task, _ = trained()

    def predict() -> tuple[Tensor, Tensor, float]:
        batch = task.data.batch(torch.arange(len(task.data)))
        with torch.no_grad(), mode(task.model, "eval"):
            logits = task.model(batch["pixel_values"])
        return logits.argmax(1), batch["labels"], float(F.cross_entropy(logits, batch["labels"]))

    ended = unlearn(task, predict, CLASSES, lr=0.003, level=0.7, gain=0.02)
    assert 0.35 <= ended.accuracy <= 0.7 + 1e-6, ended
