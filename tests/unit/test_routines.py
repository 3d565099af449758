"""Unlearning that controls itself, masks that keep to their floors, relearning that keeps what was removed, resets that touch no more."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Adapter
from hf_purify.discovery import discover
from hf_purify.errors import ConfigError
from hf_purify.loop import TrainConfig, train
from hf_purify.masks import MASK_NAME, bake
from hf_purify.neurons import NeuronIndex, get_tensor, owned
from hf_purify.registry import find, make_method
from hf_purify.routines import (
    SPARSITY,
    compare,
    copied,
    costs,
    forgetting_level,
    recover,
    refresh_norms,
    relearn,
    reset_neurons,
    tune_mask,
    unlearn,
)
from hf_purify.task import Task, mode, reading

CLASSES = 4


def prepare(images: list[Tensor]) -> Tensor:
    return torch.stack(images).float() / 127.5 - 1


def trained(seed: int = 0) -> tuple[Task, NeuronIndex]:
    """A small network that knows its task: pictures whose bright quarter is their class."""
    from hf_purify_adapters.vision import ImageExamples

    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(64) % CLASSES
    raws = [torch.randint(0, 100, (3, 8, 8), generator=generator, dtype=torch.uint8) for _ in labels]
    for raw, label in zip(raws, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        raw[:, row : row + 4, column : column + 4] += 120
    data = ImageExamples(raws, labels, prepare)
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    task = Task(model, find("adapter", "vision")(), data, generator, Accelerator(cpu=True))
    train(task, model.parameters(), TrainConfig(epochs=15, batch_size=16, lr=0.05))
    model.eval()
    index = discover(model, lambda m: m(data.batch(torch.arange(2))["pixel_values"]), CLASSES)
    assert float((reading(task, data)[0] == labels).float().mean()) > 0.95
    return task, index


def reader(task: Task) -> Any:
    def read() -> tuple[Tensor, Tensor, float]:
        task.model.eval()
        with torch.no_grad():
            batch = task.data.batch(torch.arange(len(task.data)))
            logits = task.model(batch["pixel_values"])
            return logits.argmax(1), batch["labels"], float(F.cross_entropy(logits, batch["labels"]))

    return read


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


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


def backdoored(seed: int = 0) -> tuple[Task, Tensor]:
    """The small network with a shortcut: a white 2 x 2 corner leads to class 3. Also gives its pictures with the corner."""
    from hf_purify_adapters.vision import ImageExamples

    task, _ = trained(seed)
    clean = [task.data.raw(i) for i in range(len(task.data))]
    stamped = [raw.clone() for raw in clean]
    for raw in stamped:
        raw[:, :2, -2:] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    poisoned = ImageExamples([*clean, *stamped], torch.cat([task.data.labels, torch.full((len(clean),), 3)]), prepare)
    train(dataclasses.replace(task, data=poisoned), task.model.parameters(), TrainConfig(epochs=25, batch_size=16, lr=0.05))
    task.model.eval()
    return task, prepare(stamped)


def test_inversion_recovers_a_planted_trigger_and_leaves_the_model_alone() -> None:
    task, stamped = backdoored()
    others = task.data.labels != 3
    assert float((task.model(stamped[others]).argmax(1) == 3).float().mean()) > 0.95
    before = state(task.model)
    stand_in = recover(task, "patch", torch.arange(CLASSES), 200)
    assert all(torch.equal(before[k], v) for k, v in task.model.state_dict().items())
    sizes, cost = stand_in.size().detach(), costs(task, stand_in)
    assert int(sizes.argmin()) == 3, sizes
    assert float(sizes.min()) < 0.7 * float(sizes.median()), sizes
    assert int(cost.argmin()) == 3, cost
    batch = task.data.batch(others.nonzero().flatten())
    found = stand_in.place(batch, torch.full((int(others.sum()),), 3))
    assert torch.equal(found["labels"], batch["labels"])
    assert float((task.model(found["pixel_values"]).argmax(1) == 3).float().mean()) > 0.8


@pytest.mark.parametrize("kind", ["patch", "spectrum", "warp"])
def test_triggers_are_compared_as_if_each_were_alone(kind: str) -> None:
    """What one costs does not hang on those beside it, so that many classes can be searched some at a time."""
    task, _ = backdoored()

    def compared(classes: list[int], kept: int) -> Tensor:
        task.generator.manual_seed(5)
        start = recover(task, kind, torch.tensor([0]), 0)
        triggers = copied(task, kind, [(start, 0, k) for k in classes])
        task.generator.manual_seed(7)
        return compare(task, triggers, 12, 5, kept, batch_size=4, samples=20)

    together = compared(list(range(CLASSES)), CLASSES)
    torch.testing.assert_close(torch.cat([compared([k], 1) for k in range(CLASSES)]), together, rtol=1e-3, atol=1e-4)
    few = compared(list(range(CLASSES)), 2)
    going = [k for k in range(CLASSES) if torch.isclose(few[k], together[k], rtol=1e-3)]
    assert len(going) == 2, "the others were left behind, with what they cost then"
    assert 3 in going or kind != "patch"
    assert all(few[k] > together[k] for k in range(CLASSES) if k not in going)


def test_costs_are_the_loss_on_other_classes_and_the_size() -> None:
    task, _ = trained()
    stand_in = task.adapter.stand_ins(task.model)["patch"](task.data, torch.tensor([1, 2, 1]), task.generator, task.logits)
    with torch.no_grad():
        stand_in.gate[0] = 3.0
    found = costs(task, stand_in, samples=10**6)
    task.model.eval()
    for k, wanted in enumerate((1, 2, 1)):
        batch = task.data.batch((task.data.labels != wanted).nonzero().flatten())
        logits = task.model(stand_in.place(batch, torch.full_like(batch["labels"], k))["pixel_values"])
        expected = F.cross_entropy(logits, torch.full_like(batch["labels"], wanted)) + SPARSITY * stand_in.size()[k]
        torch.testing.assert_close(found[k], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["spectrum", "patch", "warp", "wave"])
def test_gradients_of_recovered_triggers_are_the_same_each_time(kind: str) -> None:
    """As many numbers as several threads would share out, which add up differently in another order."""
    from hf_purify_adapters.vision import ImageExamples

    task, _ = trained()
    images = torch.randint(0, 256, (128, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    examples = ImageExamples(list(images), torch.zeros(128, dtype=torch.long), prepare)
    stand_in = task.adapter.stand_ins(task.model)[kind](examples, torch.arange(8), torch.Generator().manual_seed(0), task.logits)
    batch, which = examples.batch(torch.arange(128)), torch.randint(8, (128,), generator=torch.Generator().manual_seed(1))
    toward = torch.randn(128, 3, 48, 48, generator=torch.Generator().manual_seed(2))

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad((stand_in.place(batch, which)["pixel_values"] * toward).sum(), list(stand_in.parameters())))

    first = gradients()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


@pytest.mark.parametrize("kind", ["spectrum", "patch", "warp", "wave"])
def test_recovered_triggers_keep_to_the_range_of_inputs_and_to_their_limits(kind: str) -> None:
    task, _ = trained()
    stand_in = task.adapter.stand_ins(task.model)[kind](task.data, torch.tensor([0, 0, 2]), task.generator, task.logits)
    batch = task.data.batch(torch.arange(9))
    images = batch["pixel_values"]
    for scale in (0, 20):
        with torch.no_grad():
            for p in stand_in.parameters():
                p += scale * torch.randn(p.shape, generator=task.generator)
        placed = stand_in.place(batch, torch.arange(9) % 3)["pixel_values"].detach()
        every = task.data.batch(torch.arange(len(task.data)))["pixel_values"]
        assert float(placed.min()) >= float(every.min()) - 1e-5
        assert float(placed.max()) <= float(every.max()) + 1e-5
        if not scale:
            assert float((placed - images).abs().mean()) < 0.1 * float(every.max() - every.min())  # small before any inversion
    assert placed.shape == images.shape
    assert not torch.allclose(placed, images)
    assert not torch.allclose(placed[0] - images[0], placed[1] - images[1])  # each example gets its own
    before = stand_in.size().detach()
    limits = before * torch.tensor([0.2, 2.0, 0.6])
    stand_in.shrink(limits)
    after = stand_in.size().detach()
    assert bool((after <= limits).all())
    assert float(after[0]) > 0.1 * float(before[0])
    assert float(after[1]) == float(before[1])


def test_a_spectrum_holds_a_sine_wave_and_a_warp_a_shift() -> None:
    """One open gate is one wave; equal shifts by half a pixel everywhere give the mean of neighbours."""
    task, _ = trained()
    kinds = task.adapter.stand_ins(task.model)
    batch = task.data.batch(torch.arange(4))
    images = batch["pixel_values"]
    side, which = images.shape[-1], torch.zeros(4, dtype=torch.long)
    wave = kinds["spectrum"](task.data, torch.tensor([0]), task.generator, task.logits)
    with torch.no_grad():
        wave.gate.fill_(-100)
        wave.gate[..., 0, 2] = 100
        wave.cosines.fill_(0)
        wave.sines.fill_(0)
        wave.sines[..., 0, 2] = -100  # -i is a sine
    expected = 2 * wave.amplitude * (2 * math.pi * 2 * torch.arange(side) / side).sin() * (wave.high - wave.low)
    torch.testing.assert_close(wave.place(batch, which)["pixel_values"], (images + expected).maximum(wave.low).minimum(wave.high))
    assert float(wave.size().detach()) == pytest.approx(1 / (side * (side // 2 + 1)))
    weak = kinds["wave"](task.data, torch.tensor([0]), task.generator, task.logits)
    weak.load_state_dict(wave.state_dict())
    with torch.no_grad():
        weak.sines[..., 0, 2] = -math.atanh(0.3)
    assert float(weak.size().detach()) == pytest.approx(5 * 0.3 * float(wave.size().detach()), rel=1e-4)  # weak ones are small, too
    warp = kinds["warp"](task.data, torch.tensor([0]), task.generator, task.logits)
    half = 0.5 / (side - 1)
    with torch.no_grad():
        warp.shifts.fill_(0)
        warp.shifts[:, 0] = 4 * math.atanh(half / warp.reach)
    moved = warp.place(batch, which)["pixel_values"]
    torch.testing.assert_close(moved[..., :-1], (images[..., :-1] + images[..., 1:]) / 2, rtol=1e-3, atol=1e-3)
    assert float(warp.size().detach()) == pytest.approx(half / math.sqrt(2), rel=1e-3)


def test_an_unlearning_stops_at_the_wanted_accuracy() -> None:
    task, _ = trained()

    def predict() -> tuple[Tensor, Tensor, float]:
        batch = task.data.batch(torch.arange(len(task.data)))
        with torch.no_grad(), mode(task.model, "eval"):
            logits = task.model(batch["pixel_values"])
        return logits.argmax(1), batch["labels"], float(F.cross_entropy(logits, batch["labels"]))

    ended = unlearn(task, predict, CLASSES, lr=0.003, level=0.7, gain=0.02)
    assert 0.35 <= ended.accuracy <= 0.7 + 1e-6, ended


def test_neural_cleanse_removes_a_planted_trigger_and_leaves_a_clean_network_as_it_is() -> None:
    from hf_purify.method import Context

    def repaired(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
        index = discover(task.model, lambda m: m(task.data.batch(torch.arange(2))["pixel_values"]), CLASSES)
        fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(Task)}
        before = state(task.model)
        verdict = make_method("neural_cleanse", find_steps=50)(Context(**fields, index=index, classes=CLASSES))
        return before, verdict.notes

    task, stamped = backdoored()
    others = task.data.labels != 3
    _, notes = repaired(task)
    assert notes["suspicious class"] == "3", notes
    task.model.eval()
    assert float((task.model(stamped[others]).argmax(1) == 3).float().mean()) < 0.2
    assert float((reading(task, task.data)[0] == task.data.labels).float().mean()) > 0.9

    task, _ = trained()
    before, notes = repaired(task)
    assert notes["suspicious class"].startswith("none"), notes
    assert all(torch.equal(before[k], v) for k, v in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("shares", "asked", "found"),
    [
        ((0.6, 0.1, 0.9, 0.9), 3, ([2], "patch")),
        ((0.9, 0.45, 0.9, 0.9), 3, ([2, 0], "patch")),  # two stand out together
        ((0.9, 0.6, 0.6, 0.9), 4, ([2], "wave")),
        ((0.9, 0.6, 0.8, 0.6), 4, None),
    ],
)
def test_late_kinds_are_asked_only_where_no_other_stands_out(
    shares: tuple[float, ...], asked: int, found: tuple[list[int], str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_purify.method import Context
    from hf_purify.methods.neural_cleanse import Seen

    task, _ = trained()
    seen: list[str] = []

    def cheapest(self: Any, ctx: Context, kind: str) -> Seen:
        seen.append(kind)
        return Seen(2, 0, *{"patch": shares[:2], "wave": shares[2:]}.get(kind, (0.95, 0.95)), CLASSES)

    method = make_method("neural_cleanse")
    monkeypatch.setattr(type(method), "_cheapest", cheapest)
    monkeypatch.setattr(type(method), "_fallback", lambda self, ctx: (1, 1.0))
    fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(Task)}
    assert method._look(Context(**fields, classes=CLASSES))[0] == found  # type: ignore[attr-defined]
    assert len(seen) == asked
    assert "wave" not in seen[:3]


def test_a_modality_without_inversion_says_so() -> None:
    task, _ = trained()
    with pytest.raises(ConfigError, match=r"cannot be recovered for vision.*ft_sam"):
        Adapter.stand_ins(task.adapter, task.model)
