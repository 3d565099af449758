"""What a method may see: the clean samples, drawn and split, and the `Context` around them. Nothing here reads test data or triggers."""

from __future__ import annotations

import torch

from hf_purify.adapter import Examples
from hf_purify.errors import DataError
from hf_purify.lora import units
from hf_purify.method import Context
from hf_purify.recipe import PurifyRecipe, ScanRecipe
from hf_purify.session import Session
from hf_purify.task import reading


def read_clean(session: Session, recipe: PurifyRecipe | ScanRecipe) -> Examples:
    """Draw the clean samples and check that they suit the model."""
    data = session.read(recipe.clean, recipe.split, recipe.samples, shuffled=True)
    if len(data) == 0:
        raise DataError("the clean set is empty: give at least one sample per class")
    if session.classifies and len(data.labels.unique()) < 2:
        raise DataError(f"the clean set holds a single class ({int(data.labels[0])}); a repair needs samples of all classes")
    return data


def split_clean(data: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Divide clean samples into those to learn from and those to choose on, by class.

    With fewer than five samples a class both are the whole set; the second is never augmented.
    """
    counts = torch.bincount(data.labels)
    if share == 0 or int(counts[counts > 0].min()) < 5:
        return data, data
    generator = torch.Generator().manual_seed(seed + 1)
    held = []
    for c in data.labels.unique():
        rows = (data.labels == c).nonzero().flatten()
        held.append(rows[torch.randperm(len(rows), generator=generator)][: max(1, round(share * len(rows)))])
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return data.select((~chosen).nonzero().flatten()), data.select(chosen.nonzero().flatten())


def choose_augmentation(session: Session, data: Examples) -> str:
    """The strongest augmentation under which the model keeps its accuracy on clean data, within ten points.

    Flipping a digit or a traffic sign changes its class; the model itself says so.
    """
    task, kinds = session.task(data), session.adapter.augmentations()
    if not kinds:
        return "none"

    def accuracy(kind: str) -> float:
        said, right, _ = reading(task, data, kind)
        return float((said == right).float().mean())

    plain = accuracy("none")
    return next((kind for kind in kinds if accuracy(kind) >= plain - 0.1), "none")


def make_context(session: Session, clean: Examples, held_out: float) -> Context:
    """Everything a method may see."""
    learn, choose = split_clean(clean, held_out, session.recipe.seed)
    index = session.adapter.index(session.loaded, learn.batch(torch.arange(min(2, len(learn)))))
    index = units(index, session.model) if session.loaded.base else index
    kind = choose_augmentation(session, clean)
    outcomes = session.adapter.outcomes(session.loaded)
    return Context(**vars(session.task(learn, kind)), index=index, held_out=choose, classes=outcomes)
