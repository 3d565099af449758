"""What detectors are judged by: mean average precision, and the success of each goal of an attack."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.ops import box_iou

from hf_purify.errors import MissingExtra
from hf_purify.metrics import Proportion

from .examples import SceneExamples
from .outputs import IOU, Detections
from .scene import Scene


def scorer() -> Any:
    """The class that computes COCO's mean average precision.

    Raises:
        MissingExtra: torchmetrics or pycocotools is not there.
    """
    try:
        import pycocotools  # noqa: F401 - torchmetrics needs it
        from torchmetrics.detection import MeanAveragePrecision
    except ImportError as error:
        raise MissingExtra("mean average precision needs torchmetrics and pycocotools: pip install 'hf-purify[detection]'") from error
    return MeanAveragePrecision


def utility(observed: list[Detections], data: SceneExamples) -> dict[str, float]:
    """COCO's mean average precision in percent: at an IoU of .5, and over .5 to .95."""
    metric = scorer()(box_format="xyxy")
    scenes = [data.raw(i) for i in range(len(data))]
    found = [{"boxes": o.boxes * _sides(s), "scores": o.scores, "labels": o.categories} for o, s in zip(observed, scenes, strict=True)]
    metric.update(found, [{"boxes": s.objects.boxes, "labels": s.objects.categories} for s in scenes])
    result = metric.compute()
    return {"mAP@50": 100 * float(result["map_50"]), "mAP": 100 * float(result["map"])}


def _sides(scene: Scene) -> torch.Tensor:
    height, width = scene.image.shape[1:]
    return torch.tensor([width, height, width, height])


def success(observed: list[Detections], data: SceneExamples, untriggered: list[Detections]) -> Proportion:
    """Share of the attacked boxes where the attacker's wish is seen; detections count from a score of .5 on, and are of a box from an IoU of .5 on.

    - Object generation (OGA): at the place of the trigger an object of the target class is seen. Places where one is anyway do not count.
    - Regional and global misclassification (RMA, GMA): an object of another class is seen as one of the target class.
    - Object disappearance (ODA): nothing is seen of an object, of any class.

    Objects of which the same model sees nothing without the trigger, of any class, do not count: of them it cannot tell.
    """
    hits, total = 0, 0
    for i, (said, before) in enumerate(zip(observed, untriggered, strict=True)):
        scene: Scene = data.raw(i)
        if not len(scene.attacked):
            continue
        boxes, wanted = scene.attacked.boxes, scene.attacked.categories
        seen, plain = said.seen(), before.seen()
        known = (box_iou(boxes, plain.boxes * _sides(scene)) >= IOU).any(1)
        matched = box_iou(boxes, seen.boxes * _sides(scene)) >= IOU
        hit = ~matched.any(1) if scene.vanish else (matched & (seen.categories == wanted[:, None])).any(1)
        if scene.made:
            there = scene.objects.only(scene.objects.categories == wanted[0])
            known = ~(box_iou(boxes, there.boxes) >= IOU).any(1) if len(there) else torch.ones(len(boxes), dtype=torch.bool)
        hits, total = hits + int((hit & known).sum()), total + int(known.sum())
    return Proportion(hits, total)
