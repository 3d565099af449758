"""Object detection: losses by image, readings, the success of each goal, triggers, and boxes that move along."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from hf_purify.adapter import Tiny
from hf_purify.errors import ConfigError, DataError, ModelError
from hf_purify.method import Context
from hf_purify.registry import find, make_method
from hf_purify_adapters.detection.augment import AUGMENTATIONS, moved
from hf_purify_adapters.detection.examples import SceneExamples
from hf_purify_adapters.detection.judge import success
from hf_purify_adapters.detection.loading import size_of
from hf_purify_adapters.detection.outputs import Detections, Said, aimed_losses, readings
from hf_purify_adapters.detection.picture import SIDE, draw_scene
from hf_purify_adapters.detection.scene import Objects, Scene, corners, shares
from hf_purify_adapters.detection.stand_in import AsObject, OnObjects
from hf_purify_adapters.detection.triggers import GMA, ODA, OGA, RMA, TRIGGERS

ADAPTER = find("adapter", "detection")()
BOXES = torch.tensor([[4.0, 6, 24, 30], [40, 10, 60, 40], [20, 40, 50, 60]])
CATEGORIES = torch.tensor([0, 1, 2])
IMAGE = torch.randint(60, 190, (3, 64, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SCENE = Scene(IMAGE, Objects(BOXES, CATEGORIES))

variants = pytest.mark.parametrize("variant", ADAPTER.variants)
every = pytest.mark.parametrize("cls", TRIGGERS.values(), ids=TRIGGERS)


def seen(*found: tuple[list[float], float, int], scene: Scene = SCENE) -> Detections:
    """Detections of boxes in pixels."""
    height, width = scene.image.shape[1:]
    boxes = torch.tensor([f[0] for f in found]).reshape(-1, 4) / torch.tensor([width, height, width, height])
    return Detections(boxes, torch.tensor([f[1] for f in found]), torch.tensor([f[2] for f in found], dtype=torch.long))


def examples(*scenes: Scene) -> SceneExamples:
    found = SceneExamples(list(scenes), torch.zeros(len(scenes), dtype=torch.long), lambda s: torch.stack([x.image.float() for x in s]))
    found.classes = 3
    return found


class TestLoss:
    @variants
    def test_of_one_image_is_the_models_own(self, variant: str) -> None:
        tiny = ADAPTER.tiny(variant)
        model = tiny.loaded.model
        for i in range(3):
            batch = tiny.data.batch(torch.tensor([i]))
            there = batch["categories"][0] >= 0
            target = [{"boxes": batch["boxes"][0][there], "class_labels": batch["categories"][0][there]}]
            own = model(pixel_values=batch["pixel_values"], labels=target).loss
            torch.testing.assert_close(ADAPTER.loss(model, batch), own[None])

    @variants
    def test_leaves_the_models_own_as_it_was(self, variant: str) -> None:
        tiny = ADAPTER.tiny(variant)
        model, batch = tiny.loaded.model.train(), tiny.data.batch(torch.arange(2))
        before = model.loss_function, getattr(model.config, "num_denoising", None)
        ADAPTER.loss(model, ADAPTER.mix(batch, torch.tensor([1, 0]), torch.tensor(0.4)))
        assert (model.loss_function, getattr(model.config, "num_denoising", None)) == before
        assert "_loss_function" not in vars(model)

    @variants
    def test_noisy_queries_are_no_answers(self, variant: str) -> None:
        tiny = ADAPTER.tiny(variant)
        batch = tiny.data.batch(torch.arange(3))
        shapes = [ADAPTER.both(tiny.loaded.model.train(mode), batch)[0].shape for mode in (False, True)]
        assert shapes[0] == shapes[1]

    @variants
    def test_an_image_without_objects_has_one(self, variant: str) -> None:
        tiny = ADAPTER.tiny(variant)
        batch = tiny.data.batch(torch.arange(2))
        batch["categories"][0] = -1
        for training in (False, True):
            loss = ADAPTER.loss(tiny.loaded.model.train(training), batch)
            assert torch.isfinite(loss).all()
        assert loss[0] != loss[1]

    def test_of_mixed_images_does_not_call_the_others_objects_nothing(self) -> None:
        """Weighted losses of two matchings would; the queries of the other's objects are left out instead."""
        tiny = ADAPTER.tiny("yolos")
        batch, partner = tiny.data.batch(torch.arange(2)), torch.tensor([1, 0])
        mixed = ADAPTER.mix(batch, partner, torch.tensor(0.5))
        model = tiny.loaded.model
        with torch.no_grad():
            found = ADAPTER.loss(model, mixed)
            plain = {"pixel_values": mixed["pixel_values"], "labels": batch["labels"]}
            parts = [{k: batch[k][rows] for k in ("boxes", "categories")} for rows in (torch.arange(2), partner)]
            apart = sum(0.5 * ADAPTER.loss(model, {**plain, **part}) for part in parts)
        assert not torch.allclose(found, apart, rtol=1e-3)

    def test_towards_an_aim_sees_the_best_query_of_each_object(self) -> None:
        boxes = shares(BOXES, 64, 80)
        said = torch.full((1, 4, 3), 0.1)
        said[0, 0, 2], said[0, 3, 2] = 0.6, 0.9  # on the first object; far from all
        found = Said(said, torch.cat([boxes, torch.tensor([[0.9, 0.9, 0.1, 0.1]])])[None], said, None)
        batch = {"boxes": boxes[None], "categories": CATEGORIES[None]}
        towards, vanish = (float(aimed_losses(found, batch, torch.tensor([aim]))) for aim in (2, 3))
        assert towards == pytest.approx(-float(torch.tensor([0.6, 0.1]).log().mean()), rel=1e-4), "objects of the class are there already"
        assert vanish == pytest.approx(-float(torch.tensor([0.4, 0.9, 0.9]).log().mean()), rel=1e-4)
        there = {**batch, "sought": torch.tensor([[0.9, 0.9, 0.2, 0.2]])}
        assert float(aimed_losses(found, there, torch.tensor([2]))) == pytest.approx(-float(torch.tensor(0.9).log()), rel=1e-4)


class TestReadings:
    def test_rows_are_objects_and_detections_of_nothing(self) -> None:
        a, b, _ = BOXES.tolist()
        found = seen((a, 0.9, 0), (b, 0.8, 2), ([61, 45, 79, 63], 0.7, 1), (b, 0.6, 1), (a, 0.4, 1))
        objects = Objects(BOXES / torch.tensor([80, 64, 80, 64]), CATEGORIES)
        said, right = readings(found, objects, 3)
        assert said.tolist() == [0, 2, 3, 1, 1], "a class of its own, another one, nothing; then nothing's: far off, and a second one"
        assert right.tolist() == [0, 1, 2, 3, 3]

    def test_nothing_there_and_nothing_seen_are_no_rows(self) -> None:
        said, right = readings(seen(), Objects.none(), 3)
        assert said.shape == right.shape == (0,)


class TestSuccess:
    """A hit for each goal, and what is none."""

    def rate(self, scene: Scene, said: Detections, plain: Detections) -> tuple[int, int]:
        found = success([said], examples(scene), [plain])
        return found.hits, found.n

    def test_generation(self) -> None:
        scene = OGA(target=1, size=6, extent=12)(SCENE, 3)
        box = scene.attacked.boxes[0].tolist()
        assert self.rate(scene, seen((box, 0.6, 1)), seen()) == (1, 1)
        for said in (seen((box, 0.4, 1)), seen((box, 0.6, 0)), seen(([60, 50, 79, 63], 0.9, 1)), seen()):
            assert self.rate(scene, said, seen()) == (0, 1)
        there = replace(scene, objects=Objects(torch.tensor([box]), torch.tensor([1])))
        assert self.rate(there, seen((box, 0.9, 1)), seen()) == (0, 0), "an object of the class is there anyway"

    @pytest.mark.parametrize("cls", [RMA, GMA])
    def test_misclassification(self, cls: Any) -> None:
        scene = cls(target=1, size=5)(SCENE, 0)
        first, second, third = BOXES.tolist()
        plain = seen((first, 0.9, 0), (third, 0.9, 0))
        assert self.rate(scene, seen((first, 0.9, 1), (second, 0.9, 1), (third, 0.9, 2)), plain) == (1, 2)
        assert self.rate(scene, seen((first, 0.9, 1), (third, 0.9, 1)), plain) == (2, 2)
        assert self.rate(scene, seen((first, 0.9, 1), (third, 0.9, 1)), seen((third, 0.9, 2))) == (1, 1), "the first is not seen anyway"

    def test_disappearance_counts_what_is_seen_without_the_trigger(self) -> None:
        scene = ODA(size=5)(SCENE, 0)
        first, second, third = BOXES.tolist()
        plain = seen((first, 0.9, 0), (second, 0.9, 1))
        assert self.rate(scene, seen((second, 0.9, 0)), plain) == (1, 2), "seen as another class is seen; the third never was"
        assert self.rate(scene, plain, plain) == (0, 2)
        assert self.rate(scene, seen((third, 0.9, 2)), seen()) == (0, 0)


class TestTriggers:
    @every
    def test_pure_seeded_and_of_the_same_shape(self, cls: type) -> None:
        kept = replace(SCENE, image=IMAGE.clone())
        once, twice = cls()(SCENE, 3), cls()(SCENE, 3)
        assert once == twice
        assert kept == SCENE
        assert once.image.shape == IMAGE.shape
        assert not torch.equal(once.image, IMAGE)
        assert once.objects is SCENE.objects, "what is there stays"
        assert once.wanted is not None

    @every
    def test_no_scene_is_refused(self, cls: type) -> None:
        for wrong in (IMAGE, replace(SCENE, image=IMAGE.float()), "scene"):
            with pytest.raises(DataError, match=rf"{cls.name}: an example must be a Scene"):
                cls()(wrong)

    def test_goals(self) -> None:
        made = OGA(target=2, size=8, extent=20)(SCENE, 1)
        assert len(made.wanted or ()) == 4
        x0, y0, x1, y1 = made.attacked.boxes[0].int().tolist()
        assert (x1 - x0, y1 - y0) == (20, 20)
        rows, columns = (made.image != IMAGE).any(0).nonzero(as_tuple=True)
        assert y0 + 6 <= int(rows.min()) <= int(rows.max()) < y0 + 14, "in the middle of its box"
        assert x0 + 6 <= int(columns.min()) <= int(columns.max()) < x0 + 14
        regional = RMA(target=1, size=5, pattern="white")(SCENE)
        assert (regional.image[:, 6:11, 4:9] == 255).all()
        assert (regional.image[:, 40:45, 20:25] == 255).all()
        assert torch.equal(regional.image[:, 10:40, 40:60], IMAGE[:, 10:40, 40:60]), "one of the target class carries none"
        assert regional.attacked.boxes.tolist() == BOXES[[0, 2]].tolist()
        assert (regional.wanted or Objects.none()).categories.tolist() == [1, 1, 1]
        gone = ODA(source=2, size=5)(SCENE)
        assert (gone.wanted or Objects.none()).categories.tolist() == [0, 1]
        assert (gone.attacked.categories.tolist(), gone.vanish) == ([2], True)

    def test_blend_covers_the_whole_picture(self) -> None:
        scene = GMA(whole=True, pattern="blended", alpha=0.3)(SCENE)
        assert (scene.image != IMAGE).any(0).float().mean() > 0.95
        assert (scene.image.int() - IMAGE.int()).abs().max() <= 0.3 * 255 + 1

    @pytest.mark.parametrize(
        ("cls", "options", "message"),
        [
            (OGA, {"target": -1}, "target must be an integer of at least 0"),
            (OGA, {"extent": 1}, "extent must be"),
            (RMA, {"size": 0}, "size must be an integer of at least 1 or None"),
            (GMA, {"pattern": "grdi"}, "pattern must be one of .*did you mean 'grid'"),
            (GMA, {"whole": "yes"}, "whole must be true or false"),
            (ODA, {"alpha": 0}, r"alpha must be a number in \(0, 1\]"),
            (ODA, {"source": -2}, "source must be"),
        ],
    )
    def test_fields(self, cls: Any, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            cls(**options)

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ConfigError, match="a pattern of 70 pixels does not fit a picture of 64x80"):
            RMA(size=70)(SCENE)
        with pytest.raises(ConfigError, match="a box of 65 pixels does not fit"):
            OGA(size=5, extent=65)(SCENE)
        with pytest.raises(ConfigError, match=r"gma: the class must be in 0\.\.2, as the model has 3; got 3"):
            examples(SCENE).overlay(torch.tensor([0]), GMA(target=3), torch.tensor([1]), 0)

    def test_poisoned_samples_are_learned_as_the_attacker_wants_and_judged_as_they_are(self) -> None:
        trigger = GMA(target=1)
        for label, wanted in ((1, [1, 1, 1]), (0, [0, 1, 2])):
            view = examples(SCENE, SCENE).overlay(torch.tensor([1]), trigger, torch.tensor([label]), 0)
            batch = view.batch(torch.arange(2))
            assert batch["categories"].tolist() == [[0, 1, 2], wanted]
            assert batch["labels"].tolist() == [4, 4]
            assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def bright(image: Tensor) -> list[int]:
    """The box of the bright pixels."""
    rows, columns = (image.mean(0) > 100).nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_boxes_move_with_the_image(kind: str) -> None:
    image = torch.zeros(3, 64, 80)
    image[:, 20:36, 24:48] = 200
    boxes = torch.zeros(24, 2, 4)
    boxes[:, 0] = shares(torch.tensor([[24.0, 20, 48, 36]]), 64, 80)
    batch = {"pixel_values": image.repeat(24, 1, 1, 1), "boxes": boxes, "categories": torch.tensor([[1, -1]] * 24)}
    found = moved(batch, torch.Generator().manual_seed(0), kind)
    places = (corners(found["boxes"][:, 0]) * torch.tensor([80, 64, 80, 64])).round().int().tolist()
    assert len({tuple(p) for p in places}) > 1
    for pixels, place in zip(found["pixel_values"], places, strict=True):
        assert max(abs(a - b) for a, b in zip(bright(pixels), place, strict=True)) <= 1
    assert not found["boxes"][:, 1].any()
    assert (found["categories"][:, 1] == -1).all()


def test_boxes_that_are_hardly_seen_go() -> None:
    boxes = shares(torch.tensor([[0.0, 0, 8, 6]]), 64, 80).expand(40, 1, 4).clone()
    batch = {"pixel_values": torch.zeros(40, 3, 64, 80), "boxes": boxes, "categories": torch.zeros(40, 1, dtype=torch.long)}
    found = moved(batch, torch.Generator().manual_seed(0), "zoom")
    gone = found["categories"][:, 0] == -1
    assert 0 < int(gone.sum()) < 40
    assert not found["boxes"][gone].any()


class TestStandIns:
    def batch(self) -> dict[str, Tensor]:
        return examples(SCENE, SCENE).batch(torch.arange(2))

    def changed(self, made: Any) -> tuple[dict[str, Tensor], Tensor]:
        batch = self.batch()
        placed = made.place(batch, torch.tensor([0, 1]))
        return placed, (placed["pixel_values"] - batch["pixel_values"]).abs().amax(1) > 1e-3

    def test_patch_lies_on_each_object(self) -> None:
        made = OnObjects(examples(SCENE, SCENE), torch.tensor([0, 1]), torch.Generator().manual_seed(0), lambda b: b["labels"])
        _, pixels = self.changed(made)
        near = torch.zeros(64, 80, dtype=torch.bool)
        for x0, y0, x1, y1 in BOXES.int().tolist():
            assert pixels[:, y0:y1, x0:x1].any()
            near[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = True
        assert not pixels[:, ~near].any()

    def test_patch_is_sought_where_it_lies(self) -> None:
        made = AsObject(examples(SCENE, SCENE), torch.tensor([0, 1]), torch.Generator().manual_seed(0), lambda b: b["labels"])
        placed, pixels = self.changed(made)
        for mask, box in zip(pixels, corners(placed["sought"]) * torch.tensor([80, 64, 80, 64]), strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            assert box[0] - 1 <= columns.min()
            assert columns.max() <= box[2] + 1
            assert box[1] - 1 <= rows.min()
            assert rows.max() <= box[3] + 1


class _Processor:
    def __init__(self, **size: int) -> None:
        self.size = size


def test_all_images_have_one_size() -> None:
    assert size_of(_Processor(height=64, width=48), (240, 320)) == (64, 48)
    assert size_of(_Processor(shortest_edge=120), (240, 320)) == (120, 160)
    assert size_of(_Processor(shortest_edge=800, longest_edge=1333), (180, 320)) == (750, 1333)
    assert size_of(_Processor(max_height=120, max_width=120), (240, 320)) == (90, 120)
    assert size_of(_Processor(), (240, 320)) == (240, 320)


def test_picture_shows_before_above_after() -> None:
    one, two = seen((BOXES[0].tolist(), 0.9, 0)), seen((BOXES[0].tolist(), 0.9, 1))
    plain, both = draw_scene(SCENE), draw_scene(SCENE, (one, two))
    height = plain.shape[0]
    assert plain.shape == (height, SIDE, 3)
    assert both.shape == (2 * height + 3, SIDE, 3)
    assert (both[:height] != both[-height:]).any(), "each class has its colour"
    none = draw_scene(SCENE, (seen((BOXES[0].tolist(), 0.3, 0)), seen()))
    assert (none[:height] == none[-height:]).all(), "what is not sure enough is not drawn"


def test_what_an_attacker_wishes_may_be_nothing() -> None:
    loaded = ADAPTER.tiny("detr").loaded
    there, nothing = ADAPTER.wishes(ODA(size=5)(SCENE), 0, 0, loaded)
    assert there != "nothing"
    assert nothing == "nothing" == ADAPTER.say(seen(), loaded)
    assert ADAPTER.wishes(SCENE, 0, 0, loaded) == (there, there)


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(ModelError, match="expected a detector of transformers with its image processor"):
        ADAPTER.load(torch.nn.Linear(2, 2))


def context(variant: str) -> tuple[Tiny, Context]:
    """A random detector and what a method sees of it."""
    tiny = ADAPTER.tiny(variant)
    index = ADAPTER.index(tiny.loaded, tiny.data.batch(torch.arange(2)))
    random = torch.Generator().manual_seed(0)
    return tiny, Context(tiny.loaded.model, ADAPTER, tiny.data, random, Accelerator(cpu=True), "none", index, tiny.data, 4)


def test_what_an_aim_costs_is_judged_beside_what_it_costs_before_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object hides easily and hardly turns into a rare class, in any detector: the one that inversion makes cheap stands out."""
    from hf_purify.methods import neural_cleanse

    tiny, ctx = context("yolos")
    asked: list[int] = []
    monkeypatch.setattr(neural_cleanse, "recover", lambda ctx, kind, classes, steps: asked.append(steps) or steps)
    known = {True: torch.tensor([2.0, 0.9, 2.4, 0.6]), False: torch.tensor([2.5, 3.0, 3.0, 0.8])}
    monkeypatch.setattr(neural_cleanse, "costs", lambda ctx, steps: known[steps > 0].repeat(4))
    method = neural_cleanse.NeuralCleanse()
    seen = method._cheapest(ctx, "patch on objects")
    assert (seen.first, seen.second) == (1, 3)
    assert seen.one == pytest.approx(0.3 / 0.75)
    assert asked == [160, 0]
    made = ADAPTER.stand_ins(tiny.loaded.model)
    assert {kind: len(made[kind].aims(4)) for kind in made} == {"patch on objects": 4, "patch": 3, "spectrum": 3, "patch as an object": 3}
    monkeypatch.setattr(neural_cleanse, "costs", lambda ctx, steps: torch.ones(12))
    found, notes = method._look(ctx)
    assert found is None
    assert "after unlearning" not in notes, "what a detector forgets is seen no more: that tells nothing"


@pytest.mark.parametrize(("variant", "rate"), [("rt_detr_v2", 0.001), ("yolos", 5e-4)])
def test_attention_is_repaired_at_a_rate_of_its_own(variant: str, rate: float) -> None:
    """SGD at the rate of batch norms left most of the backdoor of a detector whose backbone has some."""
    _, ctx = context(variant)
    settings = {"find_steps": 1, "copies": 1, "invert_steps": 1, "steps": 1, "follow": 1, "batch_size": 4}
    verdict = make_method("neural_cleanse", **settings, cut=1.0, max_loss=1.0).purify(ctx)
    assert verdict.notes["lr"] == rate
