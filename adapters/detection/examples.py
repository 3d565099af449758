"""Scenes of a data set: columns found, boxes checked, images decoded and prepared once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor

from hf_purify.adapter import Batch, Loaded
from hf_purify.errors import ConfigError, DataError, did_you_mean
from hf_purify.tables import Selection, find_column, match_classes, open_data

from .._prepared import PreparedExamples
from ..vision.examples import decode_column, is_image
from .loading import preparer, size_of
from .scene import Objects, Scene, shares

BOXES, CATEGORIES = ("bbox", "boxes", "bboxes"), ("category", "categories", "label", "labels", "category_id", "class")
SLACK = 2.0  # pixels by which a box may stick out of the picture, as rounding makes it; it is cut
PADDING = -1  # category of a box that is none


class SceneExamples(PreparedExamples):
    """Scenes with labels `(n,)`: 0 as annotated, 1 as an attacker wants it.

    A batch holds `pixel_values` `(B, 3, H, W)`, `boxes` `(B, M, 4)` (centres and sides, as shares of the picture) and `categories` `(B, M)`, padded with -1;
    its `labels` `(B,)` are the number of classes plus one: what is to be seen is what the boxes say.
    """

    key = "pixel_values"
    classes: int
    stretched = 0  # scenes of another shape than the model is shown

    def batch(self, indices: Tensor) -> Batch:
        found = super().batch(indices)
        scenes = [self.raw(int(i)) for i in indices]
        said = [
            (s.objects if not attacked else s.wanted) or Objects.none() for s, attacked in zip(scenes, found["labels"] == 1, strict=True)
        ]
        most = max(1, *map(len, said))
        boxes, categories = torch.zeros(len(said), most, 4), torch.full((len(said), most), PADDING)
        for i, (scene, objects) in enumerate(zip(scenes, said, strict=True)):
            boxes[i, : len(objects)] = shares(objects.boxes, *scene.image.shape[1:])
            categories[i, : len(objects)] = objects.categories
        return {**found, "boxes": boxes, "categories": categories, "labels": torch.full_like(found["labels"], self.classes + 1)}

    def overlay(self, indices: Tensor, transform: Callable[[Scene, int], Scene], labels: Tensor, seed: int) -> SceneExamples:
        wanted = getattr(transform, "target", getattr(transform, "source", None))
        if wanted is not None and not 0 <= wanted < self.classes:
            name = getattr(transform, "name", "the trigger")
            raise ConfigError(f"{name}: the class must be in 0..{self.classes - 1}, as the model has {self.classes}; got {wanted}")
        view = super().overlay(indices, transform, labels, seed)
        view.classes = self.classes
        return view

    def select(self, indices: Tensor) -> SceneExamples:
        view = super().select(indices)
        view.classes = self.classes
        return view


def read_scenes(data: Any, loaded: Loaded, wanted: Selection, to_rgb: bool = False) -> SceneExamples:
    """Read images, boxes and categories; only those that are drawn are decoded.

    Boxes are `x, y, width, height` in pixels, as in COCO, in one column of records, or in two of lists.

    Raises:
        DataError: columns that are missing or could be several, an empty set, boxes of another form, outside the image or without an
            area, a category that is none of the model's.
    """
    opened = open_data(data, wanted.split, wanted.revision, loose="imagefolder")
    if not len(opened):
        raise DataError("the data set is empty: give at least one image")
    images = find_column(opened, wanted.columns.get("image"), "image", is_image)
    boxes, categories, names = _columns(opened, wanted.columns)
    classes = int(loaded.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    known = match_classes(names, loaded.labels) if names else None
    order = torch.randperm(len(opened), generator=torch.Generator().manual_seed(wanted.seed))[: wanted.samples]
    chosen = order if wanted.balanced else torch.arange(len(opened))
    pictures = decode_column(opened, images, chosen, 3, to_rgb)
    rows = opened.select_columns(list({boxes.column, categories.column})).select(chosen.tolist())
    scenes = [
        Scene(image, _objects(boxes.value(row), categories.value(row), known, classes, f"image {i}"))
        for i, image, row in zip(chosen.tolist(), pictures, rows, strict=True)
    ]
    _check_form(scenes)
    size = size_of(loaded.processor, Counter(tuple(s.image.shape[1:]) for s in scenes).most_common(1)[0][0])
    result = SceneExamples(scenes, torch.zeros(len(scenes), dtype=torch.long), preparer(loaded.processor, size))
    result.classes = classes
    result.stretched = sum(abs(s.image.shape[1] / s.image.shape[2] / (size[0] / size[1]) - 1) > 0.1 for s in scenes)
    return result


class Place(NamedTuple):
    """Where a data set holds something: a column, and the entry of its records, if they are records."""

    column: str
    entry: str

    def value(self, row: Mapping[str, Any]) -> Any:
        """What a row holds there; of a list of records, the entries of all."""
        held = row[self.column]
        if not self.entry or held is None:
            return held
        return [one[self.entry] for one in held] if isinstance(held, list) else held[self.entry]


def _columns(data: datasets.Dataset, named: Mapping[str, str]) -> tuple[Place, Place, list[str] | None]:
    """Where boxes and categories are, and the names of the categories where they have some."""
    found = []
    for role, usual in (("boxes", BOXES), ("categories", CATEGORIES)):
        if (given := named.get(role)) is not None:
            column, _, entry = given.partition(".")
            if column not in data.features:
                raise DataError(f"no column '{column}'{did_you_mean(column, data.features)}; the data set has: {', '.join(data.features)}")
            if entry and entry not in entries(data.features[column]):
                raise DataError(
                    f"column '{column}' has no entry '{entry}' (there is: {', '.join(entries(data.features[column])) or 'none'})"
                )
            found.append(Place(column, entry))
            continue
        inside = [Place(c, e) for c, f in data.features.items() for e in usual if e in entries(f)]
        flat = [Place(c, "") for c in usual if c in data.features]
        if not inside and not flat:
            raise DataError(
                f"no {role} found; name them (--column {role}=NAME or NAME.ENTRY). The data set has: {', '.join(data.features)}"
            )
        found.append((inside or flat)[0])
    column, entry = found[1]
    feature = data.features[column]
    while not hasattr(feature, "names") and (isinstance(feature, dict) or hasattr(feature, "feature")):
        feature = feature[entry] if isinstance(feature, dict) else feature.feature
    return found[0], found[1], list(feature.names) if hasattr(feature, "names") else None


def entries(feature: Any) -> list[str]:
    """Names of what a column of records, or of lists of them, holds."""
    inner = getattr(feature, "feature", feature)
    return list(inner) if isinstance(inner, dict) else []


def _objects(boxes: Any, categories: Any, known: list[int] | None, classes: int, what: str) -> Objects:
    """Boxes and categories of one image, checked; boxes still as `x, y, width, height` until all are seen."""
    if boxes is None or categories is None:
        raise DataError(f"{what} has no boxes or no categories (a missing value); an image without objects has empty lists")
    if len(boxes) != len(categories):
        raise DataError(f"{what} has {len(boxes)} boxes and {len(categories)} categories")
    if not len(boxes):
        return Objects.none()
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            raise DataError(f"{what}: a box must be four numbers (x, y, width, height in pixels), got {box}")
    for category in categories:
        if not isinstance(category, int):
            raise DataError(f"{what}: a category must be the number of a class, got {category!r}; cast names to ClassLabel")
    found = torch.tensor(boxes, dtype=torch.float64)
    if not torch.isfinite(found).all():
        raise DataError(f"{what} has a box that is NaN or infinite")
    numbers = torch.tensor(categories)
    most = classes if known is None else len(known)
    bad = next((int(c) for c in numbers if not 0 <= c < most), None)
    if bad is not None:
        raise DataError(f"{what} has the category {bad}, which is outside the model's 0..{most - 1}")
    return Objects(found, numbers if known is None else torch.tensor(known)[numbers])


def _check_form(scenes: list[Scene]) -> None:
    """Turn `x, y, width, height` into corners, in place; say which other form boxes seem to have where that cannot be.

    Raises:
        DataError: the boxes of the data set have another form, or one is outside its image or has no area.
    """
    boxes = [(i, s, b) for i, s in enumerate(scenes) for b in s.objects.boxes]
    if not boxes:
        raise DataError("none of the images has an object; a detector needs some")

    def fits(box: Tensor, image: Tensor) -> bool:
        height, width = image.shape[1:]
        return bool((box >= -SLACK).all() and box[2] <= width + SLACK and box[3] <= height + SLACK)

    def as_corners(box: Tensor) -> Tensor:
        return torch.cat([box[:2], box[:2] + box[2:]])

    wrong = [(i, b) for i, s, b in boxes if not fits(as_corners(b), s.image)]
    form = "boxes must be x, y, width, height in pixels of the image, as in COCO"
    if all(float(b.max()) <= 1 for _, _, b in boxes):
        raise DataError(f"{form}; these are all within 0..1: multiply them by the size of the image")
    if len(wrong) > 0.05 * len(boxes) and all(bool((b[2:] > b[:2]).all()) and fits(b, s.image) for _, s, b in boxes):
        raise DataError(f"{form}; these look like x0, y0, x1, y1 (Pascal VOC): subtract the first two numbers from the last two")
    for i, s, box in boxes:
        if float(box[2:].min()) <= 0:
            raise DataError(f"image {i}: the box {box.tolist()} has no area ({form})")
        if not fits(as_corners(box), s.image):
            height, width = s.image.shape[1:]
            raise DataError(f"image {i}: the box {box.tolist()} lies outside the image of {width}x{height} pixels ({form})")
    for s in scenes:
        found = s.objects.boxes
        height, width = s.image.shape[1:]
        limits = found.new_tensor([width, height])
        low = found[:, :2].clamp(min=0)
        high = (found[:, :2] + found[:, 2:]).minimum(limits)
        object.__setattr__(s, "objects", Objects(torch.cat([low, high], 1).float(), s.objects.categories))


def names_in(data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
    """Names of the categories of a data set, in order; numbers where it names none."""
    opened = open_data(data, split, loose="imagefolder")
    _, place, names = _columns(opened, columns)
    if names is not None:
        return names
    found = [int(c) for row in opened.select_columns([place.column]) for c in place.value(row) or ()]
    return [str(c) for c in range(max(found, default=-1) + 1)]
