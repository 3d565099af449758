"""Named uses of `train`: unlearn, relearn, tune a mask, reset neurons. Methods are written in these verbs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_purify import states
from hf_purify.adapter import Batch
from hf_purify.loop import TrainConfig, train
from hf_purify.masks import masked
from hf_purify.neurons import NeuronIndex, ParamSlice, get_tensor, owned, spread
from hf_purify.resuming import stage
from hf_purify.sharding import local, multiply_, total_norm
from hf_purify.sharing import BATCH_NORM
from hf_purify.task import Task, fetch, mode


@dataclass(frozen=True)
class Unlearned:
    """How an unlearning ended: steps taken, the rate it ended with, held-out accuracy and loss, share of the largest class."""

    steps: int
    lr: float
    accuracy: float
    loss: float
    majority: float
    majority_class: int


def forgetting_level(classes: int) -> float:
    """Accuracy at which the clean task counts as forgotten: twice chance, `max(2/K, 1/K + 0.05)`, at most 0.2 from 10 classes on."""
    level = max(2 / classes, 1 / classes + 0.05)
    if classes <= 2:
        return 0.5
    return min(level, 0.2) if classes >= 10 else level


def unlearn(
    task: Task,
    predict: Callable[[], tuple[Tensor, Tensor, float]],
    classes: int,
    lr: float = 0.01,
    max_steps: int = 400,
    config: TrainConfig | None = None,
    level: float | None = None,
    gain: float = 0.1,
) -> Unlearned:
    """Ascend the clean loss over all weights until the clean task is forgotten and no further.

    The published fixed rate overshoots on some networks within an epoch and never arrives on others, so the ascent
    controls itself: held-out accuracy is read after every step; a step that falls through the band below the level is
    taken back and the rate halved; a rate that moves nothing grows. Batch norms use their running statistics, which
    stay those of the original.

    Args:
        predict: gives held-out predictions `(n,)`, labels `(n,)` and mean loss.
        lr: first rate; the one that is found is reported.
        max_steps: bound on all steps, those taken back too.
        level: accuracy at which to stop; None is `forgetting_level`.
        gain: a step that raises the loss by less lets the rate grow.
    """
    level = (forgetting_level(classes) if level is None else level) + 1e-6
    first = lr
    floor = max(1.1 / classes, level / 2) if classes > 2 else 0.3
    params = task.parameters()
    config = config or TrainConfig(steps=1)
    used = 0

    def copies() -> list[Tensor]:
        return [p.detach().clone() for p in params]

    def restore(saved: list[Tensor]) -> None:
        with torch.no_grad():
            for p, s in zip(params, saved, strict=True):
                p.copy_(s)

    def read() -> tuple[float, float, Tensor]:
        predictions, labels, loss = predict()
        return float((predictions == labels).float().mean()), loss, predictions

    def state() -> states.State:
        values = {"used": used, "lr": lr, "accuracy": accuracy, "loss": loss}
        kept = states.copies(task.accelerator, states.numbered("trained", params)) | states.random_state(task.accelerator, task.generator)
        return states.State(kept | {"predictions": predictions}, values)

    cap = 8 * math.log(max(classes, 2))
    step = dataclasses.replace(config, steps=1, epochs=None, momentum=0.0, ascend=True, clip=1.0, mode="frozen_norm")
    with stage(task.progress, "unlearn") as here:
        if here.saved is None:
            accuracy, loss, predictions = read()
        else:
            states.put_copies(states.numbered("trained", params), here.saved.tensors)
            states.put_random_state(task.accelerator, task.generator, here.saved.tensors)
            used, lr, accuracy, loss = (here.saved.values[name] for name in ("used", "lr", "accuracy", "loss"))
            predictions = here.saved.tensors["predictions"]
        kept = copies()
        while not here.ended and used < max_steps and accuracy > level and lr > 1e-4 * first:
            train(task, params, dataclasses.replace(step, lr=lr), title="unlearn")
            used += 1
            new_accuracy, new_loss, found = read()
            if not math.isfinite(new_loss) or new_loss > cap or new_accuracy < floor:  # fell through: back, and smaller steps
                restore(kept)
                lr /= 2
            else:
                lr = lr * 1.5 if new_loss - loss < gain else lr
                accuracy, loss, predictions, kept = new_accuracy, new_loss, found, copies()
            here.step(used, state)
        here.end(state)
    counts = torch.bincount(predictions, minlength=classes).float() / max(1, len(predictions))
    return Unlearned(used, lr, accuracy, loss, float(counts.max()), int(counts.argmax()))


def tune_mask(
    task: Task,
    index: NeuronIndex,
    config: TrainConfig,
    *,
    floor: Tensor | float = 0.0,
    penalty: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
    level: str = "activation",
    title: str = "tune mask",
) -> Tensor:
    """Learn a mask over `index` with all weights frozen; after each step it is clipped to `[floor, 1]`.

    Returns:
        `(N,)`, detached.
    """
    mask = nn.Parameter(torch.ones(len(index), device=task.device) if start is None else start.to(task.device).clone())
    low = torch.as_tensor(floor, device=task.device)

    def clip(_: int) -> None:
        with torch.no_grad():
            mask.copy_(mask.clamp(max=1.0).maximum(low.to(mask)))

    with masked(task.model, index, mask, level=level):
        train(task, [mask], config, penalty=(lambda: penalty(mask)) if penalty else None, after_step=clip, title=title)
    return mask.detach()


def relearn(
    task: Task,
    config: TrainConfig,
    *,
    index: NeuronIndex | None = None,
    removed: Tensor | None = None,
    objective: Callable[[Batch], Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    sharpness: float = 0.0,
    after_step: Callable[[int], None] | None = None,
    stop: Callable[[int], bool] | None = None,
    changed: Sequence[Tensor] = (),
    title: str = "relearn",
) -> None:
    """Fine-tune all weights; neurons `removed` `(N,)` before stay at zero.

    Args:
        changed: tensors that `after_step` changes in place.
        sharpness: radius of adaptive sharpness-aware minimisation; 0 is plain fine-tuning. See `methods/ft_sam.py`.
    """
    gates: list[tuple[ParamSlice, Tensor]] = []
    if index is not None and removed is not None and bool(removed.any()):
        for group, gone in zip(index, removed.split(index.sizes), strict=True):
            if gone.any():
                gates.append((group.gate, spread((~gone).float(), group.gate).to(task.device)))

    def keep(step: int) -> None:
        for gate, factor in gates:
            multiply_(get_tensor(task.model, gate.param), factor, gate.axis, gate.start)
        if after_step:
            after_step(step)

    params = task.parameters()
    train(
        task,
        params,
        config,
        objective=objective,
        penalty=penalty,
        after_backward=_at_the_sharpest(task, params, sharpness) if sharpness else None,
        after_step=keep if gates or after_step else None,
        stop=stop,
        changed=changed,
        title=title,
    )


def _at_the_sharpest(task: Task, params: list[nn.Parameter], radius: float) -> Callable[[Callable[[], object]], None]:
    """Replace gradients at `w` by those at `w + e`, `e = radius |w|^2 g / || |w| g ||`; running statistics are left alone there."""

    def after_backward(again: Callable[[], object]) -> None:
        with torch.no_grad():
            scaled = [(p, p.abs() * p.grad) for p in params if p.grad is not None]
            total = total_norm([s for _, s in scaled]) + 1e-12
            steps = [(local(p), local(radius * p.abs() * s) / total) for p, s in scaled]
            for p, e in steps:
                p.add_(e)
            for p, _ in scaled:
                p.grad = None
        norms = [m for m in task.model.modules() if isinstance(m, BATCH_NORM)]
        momenta = [m.momentum for m in norms]
        try:
            for m in norms:
                m.momentum = 0.0
            again()
        finally:
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum
            with torch.no_grad():
                for p, e in steps:
                    p.sub_(e)

    return after_backward


@torch.no_grad()
def reset_neurons(model: nn.Module, index: NeuronIndex, chosen: Tensor, generator: torch.Generator) -> None:
    """Draw the weights of `chosen` `(N,)` neurons anew: incoming rows uniform in `+-sqrt(2 / fan_in)`, biases zero.

    Hidden units start silent: their outgoing column, the gate, becomes zero.
    """
    for group, picked in zip(index, chosen.split(index.sizes), strict=True):
        if not picked.any():
            continue
        for part in group.params:
            tensor = get_tensor(model, part.param)
            view = owned(tensor.detach(), part, group.size)
            here = picked.to(view.device)
            if part is group.gate and group.role in ("hidden", "attention"):
                view[here] = 0
            elif view.dim() == 1:
                view[here] = 0 if part.param.endswith("bias") else 1
            else:
                bound = math.sqrt(2 / view[0].numel())
                noise = torch.rand(view[here].shape, generator=generator) * 2 - 1
                view[here] = (noise * bound).to(view)


@torch.no_grad()
def refresh_norms(task: Task, batch_size: int = 128) -> int:
    """Estimate the running statistics of batch norms anew, as a plain average over the data. Returns the number of norms."""
    norms = [m for m in task.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    if not norms:
        return 0
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        with mode(task.model, "eval"):
            for norm in norms:
                norm.train()
            for indices in torch.arange(len(task.data)).split(batch_size):
                if len(indices) > 1:
                    task.adapter.logits(task.model, fetch(task, indices))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)
