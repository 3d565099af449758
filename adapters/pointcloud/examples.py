"""Clouds of a data set, read once and prepared for a model once."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from hf_purify.errors import DataError
from hf_purify.tables import Selection, find_column, read_each

from .._folders import FILE
from .._prepared import Prepare, PreparedExamples
from .files import open_clouds, read_mesh
from .models import PointCloudFeatureExtractor, unit_sphere

LEAST = 16  # points of a cloud
FAR = 1e6  # no coordinate may lie farther away where clouds are not scaled


class CloudExamples(PreparedExamples):
    """Clouds `(P, 3)` of float32 with labels `(n,)`, and what prepares them for the model."""

    key = "points"


def read_clouds(data: Any, processor: Any, prepare: Prepare, classes: int, model_labels: list[str], wanted: Selection) -> CloudExamples:
    """Read clouds and labels; only those that are drawn are read. Where the processor scales clouds, they are scaled here: a trigger's
    units are those of the unit sphere.

    Raises:
        DataError: a cloud with NaN, of another shape, with fewer than 16 points or all of them at one place; labels that do not fit.
    """
    opened = open_clouds(data, wanted.split, wanted.revision)
    chosen, labels = wanted.labelled(opened, classes, model_labels, "cloud")
    meshes = FILE in opened.features and "points" not in wanted.columns
    name = FILE if meshes else find_column(opened, wanted.columns.get("points"), "points", _holds_points)
    scaled = not isinstance(processor, PointCloudFeatureExtractor) or processor.normalize
    rows = opened.select_columns([name]).with_format("numpy") if not meshes else opened

    def read(i: int) -> Tensor:
        return to_cloud(read_mesh(rows[i][name]) if meshes else rows[i][name], f"cloud {i}", scaled)

    return CloudExamples(read_each(chosen, "read clouds", read), labels, prepare)


def _holds_points(_: str, feature: Any) -> bool:
    """Is a column of arrays, or of lists of lists, of numbers?"""
    if isinstance(feature, datasets.Array2D):
        return True
    inner = getattr(getattr(feature, "feature", None), "feature", None)
    return str(getattr(inner, "dtype", "")).startswith(("float", "int", "uint"))


def to_cloud(points: Any, what: str, scaled: bool = True) -> Tensor:
    """Points `(P, 3)` as float32, scaled to the unit sphere if asked.

    Args:
        what: for messages, such as `cloud 3`.

    Raises:
        DataError: they are no cloud.
    """
    try:
        array = np.asarray(points.tolist() if getattr(points, "dtype", None) is np.dtype(object) else points, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{what}: expected points (P, 3) of numbers, got rows of different lengths or no numbers") from None
    if array.ndim != 2 or array.shape[1] != 3:
        hint = "; this looks like (3, P): transpose it" if array.ndim == 2 and array.shape[0] == 3 else ""
        raise DataError(f"{what}: expected points of the shape (P, 3), got {array.shape}{hint}")
    if len(array) < LEAST:
        raise DataError(f"{what} has {len(array)} points; a cloud needs at least {LEAST}")
    if not np.isfinite(array).all():
        raise DataError(f"{what} holds NaN or infinite coordinates in {int((~np.isfinite(array)).any(1).sum())} of {len(array)} points")
    largest = np.abs(array).max()
    if not scaled:
        if largest > FAR:
            raise DataError(
                f"{what} has coordinates of up to {largest:.3g}, beyond {FAR:g}: scale clouds, or let the processor (normalize)"
            )
        return torch.from_numpy(array.astype(np.float32))
    extent = (array - array[0]) / max(largest, 1e-300)
    if np.abs(extent).max() < 1e-9:
        raise DataError(f"the points of {what} all lie at one place, as far as coordinates of {largest:.3g} can tell")
    return unit_sphere(torch.from_numpy(extent))
