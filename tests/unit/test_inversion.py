"""Recovered triggers: that they are found, compared fairly, and keep to their limits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from small_task import CLASSES, prepare, state, trained
from torch import Tensor
from torch.nn import functional as F

from hf_purify.adapter import Adapter
from hf_purify.discovery import discover
from hf_purify.errors import ConfigError
from hf_purify.inversion import SPARSITY, compare, copied, costs, recover
from hf_purify.loop import TrainConfig, train
from hf_purify.registry import make_method
from hf_purify.task import Task, reading


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
