"""What a job sends to experiment trackers, by accelerate: the losses of each training step by step, and the figures of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from hf_purify.errors import MissingExtra, unknown

PROJECT = "hf-purify"


def check_trackers(names: Sequence[str]) -> None:
    """Raises UnknownName for a tracker that accelerate does not know, and MissingExtra where its package is absent."""
    there = [str(getattr(t, "value", t)) for t in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in there:
            own = "pip install 'hf-purify[tracking]'" if name in ("tensorboard", "trackio") else f"install the package of {name}"
            raise MissingExtra(f"the tracker '{name}' is not there: {own}")


def begin(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Open the trackers, with the settings of the job as those of a run."""
    if accelerator.log_with:
        accelerator.init_trackers(PROJECT, config={k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.items()})


def send_losses(accelerator: Accelerator, title: str, losses: Sequence[Tensor], lr: float, first: int) -> None:
    """The losses of steps from `first` on, under the name of the training."""
    if accelerator.trackers:
        for step, loss in enumerate(losses, first):
            accelerator.log({f"{title}/loss": float(loss), f"{title}/lr": lr}, step=step)


def send_figures(accelerator: Accelerator, figures: dict[str, float]) -> None:
    """Figures at the end of a job; the trackers are closed."""
    if accelerator.trackers:
        accelerator.log(figures, step=0)
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []
