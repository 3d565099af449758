"""What a detector says: losses by image, also of mixed images, rows of logits, and detections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou

from hf_purify.adapter import Batch

from .scene import Objects, corners

SCORE = 0.5  # of a detection that counts as seen, as transformers' own default when it draws boxes
IOU = 0.5  # of a detection with an object that it is one of
OWN = 0.3  # of a query with an object from which on it speaks of that
LEAST, MOST = 0.01, 100  # score and number of the detections of an image that are kept
SHUT = -1e4  # logit of an answer that is none


class Said(NamedTuple):
    """Scores `(B, Q, K)` of each class by query, boxes `(B, Q, 4)` as centres and sides, the raw logits, and losses `(B,)` where there were targets."""

    scores: Tensor
    boxes: Tensor
    logits: Tensor
    losses: Tensor | None


def run(model: nn.Module, batch: Batch, targets: bool = True) -> Said:
    """One forward pass; with `targets` losses too, each image's by itself."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    pixels = batch["pixel_values"].to(weight.dtype)
    if not targets:
        out = model(pixel_values=pixels)
    else:
        with _by_image(model, batch):
            out = model(pixel_values=pixels, labels=_targets(batch))
    logits, boxes = out.logits.float(), out.pred_boxes.float()
    if (noisy := getattr(out, "denoising_meta_values", None)) is not None:  # noisy queries come first in training
        first = noisy["dn_num_split"][0]
        logits, boxes = logits[:, first:], boxes[:, first:]
    return Said(scores_of(logits, model.config), boxes, logits, out.loss if targets else None)


def scores_of(logits: Tensor, config: Any) -> Tensor:
    """Scores of each class, from a sigmoid, or from a softmax whose last class is nothing."""
    return logits.softmax(-1)[..., :-1] if logits.shape[-1] > config.num_labels else logits.sigmoid()


def rows_of(said: Said) -> Tensor:
    """Logits, a row for each thing that is said, image by image: what a query sees (of a sigmoid, yes or no for each class), and each coordinate as a share."""
    logits, boxes = said.logits, said.boxes.clamp(1e-4, 1 - 1e-4)
    if logits.shape[-1] == said.scores.shape[-1]:
        logits = torch.stack([torch.zeros_like(logits), logits], -1).flatten(1, 2)
    odds = torch.stack([torch.zeros_like(boxes), boxes.logit()], -1).flatten(1, 2)
    odds = F.pad(odds, (0, logits.shape[-1] - 2), value=SHUT)
    return torch.cat([logits, odds], 1).flatten(0, 1)


def _targets(batch: Batch) -> list[dict[str, Tensor]]:
    """What the model's own loss takes; of a mixed batch, the objects of both images."""
    found = []
    for i in range(len(batch["categories"])):
        parts = [_objects_of(batch, i)]
        if "partner_boxes" in batch:
            parts.append(_objects_of(batch, i, "partner_"))
        found.append({"boxes": torch.cat([p.boxes for p in parts]), "class_labels": torch.cat([p.categories for p in parts])})
    return found


def _objects_of(batch: Batch, i: int, whose: str = "") -> Objects:
    """The objects of an image, or those of the one that it was mixed with (`partner_`), their boxes as centres and sides."""
    boxes, categories = batch[f"{whose}boxes"][i], batch[f"{whose}categories"][i]
    there = categories >= 0
    return Objects(boxes[there], categories[there])


@contextlib.contextmanager
def _by_image(model: Any, batch: Batch) -> Iterator[None]:
    """Within, the model's loss is `(B,)`: its own criterion, asked image by image. Of mixed images, no noisy queries are made."""
    from transformers.loss import loss_for_object_detection

    whole, config = model.loss_function, model.config
    mixed = "partner_boxes" in batch
    noisy = getattr(config, "num_denoising", 0)

    def split(
        logits: Tensor, labels: list[dict[str, Tensor]], device: Any, boxes: Tensor, config: Any, *layers: Tensor | None, **more: Any
    ) -> tuple:
        axis = 0 if "denoising_meta_values" in more else 1  # of the images, in what is stacked over layers
        parts = _Parts(whole, device, config, axis, logits, boxes, layers, more)
        losses = [_mixed(parts, batch, i, labels[i]) if mixed else parts.loss(i, labels[i]) for i in range(len(labels))]
        return torch.stack(losses), {}, None

    model.loss_function = split
    if mixed and noisy:
        config.num_denoising = 0
    # transformers' criterion counts the boxes of all processes each time that it is asked: other processes have other images
    alone, loss_for_object_detection.is_accelerate_available = loss_for_object_detection.is_accelerate_available, lambda: False
    try:
        yield
    finally:
        loss_for_object_detection.is_accelerate_available = alone
        if mixed and noisy:
            config.num_denoising = noisy
        if "_loss_function" in vars(model):
            del model._loss_function


class _Parts(NamedTuple):
    """All that a criterion takes, of a whole batch."""

    criterion: Any
    device: Any
    config: Any
    axis: int
    logits: Tensor
    boxes: Tensor
    layers: tuple[Tensor | None, ...]
    more: dict[str, Any]

    def loss(self, i: int, target: dict[str, Tensor], kept: Tensor | None = None) -> Tensor:
        """The loss of image `i`; with `kept`, of these queries alone."""

        def part(value: Any, axis: int = 0, queries: int = 1) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.narrow(axis, i, 1)
            return value if kept is None else value.index_select(queries, kept)

        def other(name: str, value: Any) -> Any:
            if name == "denoising_meta_values" and value is not None:
                return {**value, "dn_positive_idx": [value["dn_positive_idx"][i]]}
            if name in ("predicted_corners", "initial_reference_points"):
                return part(value, self.axis, 2)
            return part(value)

        layers = [part(value, self.axis, 2) for value in self.layers]
        more = {name: other(name, value) for name, value in self.more.items()}
        loss, *_ = self.criterion(part(self.logits), [target], self.device, part(self.boxes), self.config, *layers, **more)
        return loss


def _mixed(parts: _Parts, batch: Batch, i: int, both: dict[str, Tensor]) -> Tensor:
    """The loss of two images on one canvas: objects of both are matched together, and the losses for one's and the other's, in which the
    queries of the other's are neither right nor wrong, are weighted by their shares.
    """
    count, share = len(_objects_of(batch, i)), batch["share"]
    query, found = match(parts, i, both)
    own = found < count
    if float(share) in (0.0, 1.0):  # what has no share is not there at all
        query, own = query[:0], own[:0]
    total = parts.logits.new_zeros(())
    for others, objects, weight in ((query[~own], slice(0, count), share), (query[own], slice(count, None), 1 - share)):
        kept = torch.ones(parts.logits.shape[1], dtype=torch.bool, device=parts.logits.device)
        kept[others] = False
        total = total + weight * parts.loss(i, {name: value[objects] for name, value in both.items()}, kept.nonzero().flatten())
    return total


@torch.no_grad()
def match(parts: _Parts, i: int, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and objects `(m,)` of the cheapest matching in image `i`, by score, distance and overlap (Carion et al., ECCV 2020)."""
    scores, boxes = scores_of(parts.logits[i].float(), parts.config), parts.boxes[i].float()
    cost = 5 * torch.cdist(boxes, target["boxes"], p=1) - 2 * generalized_box_iou(corners(boxes), corners(target["boxes"]))
    cost = cost - scores[:, target["class_labels"]]
    query, found = linear_sum_assignment(cost.nan_to_num(1e6).cpu().numpy())
    return torch.as_tensor(query, device=boxes.device), torch.as_tensor(found, device=boxes.device)


def aimed_losses(said: Said, batch: Batch, wanted: Tensor) -> Tensor:
    """Loss `(B,)` towards an attacker's aim for each image: class `wanted` for its objects, or none where `wanted` is the number of classes.

    An aim is reached where some query on an object says so (at an IoU of .5 or more), or none says anything. With `sought` boxes `(B, 4)` in
    the batch, an object of the class is wanted with its middle there, besides those that are there anyway.
    """
    classes = said.scores.shape[-1]
    losses = []
    for i, (aim, scores) in enumerate(zip(wanted.tolist(), said.scores.clamp(1e-5, 1 - 1e-5), strict=True)):
        boxes = said.boxes[i].detach()
        if "sought" in batch:
            low, high = corners(batch["sought"][i]).split(2)
            there = _objects_of(batch, i).boxes.float()
            near = ((boxes[:, :2] >= low) & (boxes[:, :2] <= high)).all(1)
            near = near & ~(box_iou(corners(boxes), corners(there)) >= OWN).any(1)
            losses.append(-_best(scores[:, aim], near[None], -(boxes[:, :2] - (low + high) / 2).norm(dim=1)[None]).log().mean())
            continue
        objects = _objects_of(batch, i)
        objects = objects.only(objects.categories != aim)
        if not len(objects):
            losses.append(said.scores[i].sum() * 0)
            continue
        overlap = box_iou(corners(objects.boxes.float()), corners(boxes))
        value = scores[:, aim] if aim < classes else scores.amax(1)
        best = _best(value, overlap >= IOU, overlap)
        losses.append(-(best if aim < classes else 1 - best).log().mean())
    return torch.stack(losses)


def _best(values: Tensor, fits: Tensor, nearness: Tensor) -> Tensor:
    """The best value `(n,)` among the queries `(Q,)` that fit `(n, Q)`; where none does, that of the nearest."""
    among = torch.where(fits, values.detach(), -1.0)
    chosen = torch.where(fits.any(1), among.argmax(1), nearness.argmax(1))
    return values[chosen]


class Detections(NamedTuple):
    """What was seen on one image: boxes `(n, 4)` as corners in shares of it, scores and classes `(n,)`, best first."""

    boxes: Tensor
    scores: Tensor
    categories: Tensor

    def seen(self) -> Detections:
        """Those that count."""
        return Detections(*(v[self.scores >= SCORE] for v in self))


def detections(said: Said) -> list[Detections]:
    """Of each image, the 100 best pairs of query and class with a score of .01 or more."""
    found = []
    for scores, boxes in zip(said.scores.cpu(), corners(said.boxes).clamp(0, 1).cpu(), strict=True):
        best = scores.flatten().topk(min(MOST, scores.numel()))
        kept = best.indices[best.values >= LEAST]
        query, category = kept // scores.shape[1], kept % scores.shape[1]
        found.append(Detections(boxes[query], best.values[: len(kept)], category))
    return found


def readings(found: Detections, objects: Objects, classes: int) -> tuple[Tensor, Tensor]:
    """What is said and what should be, `(rows,)` each: a row for each object, `classes` where it is not seen, and one for each detection of nothing.

    The share of right rows is that of true positives among all objects and detections. The boxes of `objects` are corners, as shares.
    """
    seen = found.seen()
    said, free = torch.full((len(objects),), classes), torch.ones(len(objects), dtype=torch.bool)
    overlap = box_iou(seen.boxes, objects.boxes) if len(objects) and len(seen.boxes) else torch.zeros(len(seen.boxes), len(objects))
    extra = []
    for row, category in zip(overlap, seen.categories, strict=True):
        best = int((row * free).argmax()) if len(objects) else 0
        if len(objects) and free[best] and row[best] >= IOU:
            said[best], free[best] = category, False
        else:
            extra.append(int(category))
    nothing = torch.full((len(extra),), classes)
    return torch.cat([said, torch.tensor(extra, dtype=torch.long)]), torch.cat([objects.categories, nothing])
