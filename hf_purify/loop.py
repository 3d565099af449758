"""`train()`: the only place that takes an optimizer step. Runs on accelerate.

for step in range(steps):                                               # from where a checkpoint left off, if there is one
    indices        <- next batch (seeded)
    batch          <- data.batch(indices), augmented, mixed
    for part of batch:                                                  # all of it, or several after each other to save memory
        loss       <- mean(task.loss(part)) + penalty()                 # or objective(part); each process runs its share of the rows
        backward
    average gradients over processes; after_backward(again); clip; optimizer.step(); scheduler.step()
    after_step(step)                                                    # projections: clip a mask, keep zeros
    stop(step) -> leave                                                 # asked for by the caller, never by default
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_purify.adapter import Batch
from hf_purify.errors import ConfigError, DataError, Diverged
from hf_purify.resuming import stage
from hf_purify.sharing import batch_statistics, part_of
from hf_purify.states import Running
from hf_purify.task import Task, fetch, mode
from hf_purify.tracking import send_losses

POOL = 50  # batches among which samples of like length are put together
WARM_UP = 1 / 25  # share of the rate that a warm-up starts at, as torch's OneCycleLR does: the first step counts


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps; or `epochs` over the data.
        batch_size: samples a step over all processes; at most the data, unless drawn with replacement.
        replacement: draw with replacement.
        optimizer: `sgd` or `adamw`.
        momentum: of `sgd`; the first beta of `adamw`.
        schedule: `constant`, `cosine` (to `lr_end`) or `onecycle` (up from `lr / 25` in a fifth of the steps, then down to `lr_end`).
        clip: bound on the gradient norm, None for none.
        ascend: maximise the loss.
        mixup: MixUp with one Beta(1, 1) share a batch.
        augment: use the task's augmentation.
        mode: `train`, `eval`, or `frozen_norm` (train mode with running statistics used and left alone).
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 128
    replacement: bool = False
    optimizer: str = "sgd"
    lr: float = 0.01
    lr_end: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    schedule_every: int = 1
    clip: float | None = None
    ascend: bool = False
    mixup: bool = False
    augment: bool = True
    mode: str = "train"

    def __post_init__(self) -> None:
        for name, choices in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("constant", "cosine", "onecycle")),
            ("mode", ("train", "eval", "frozen_norm")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got '{getattr(self, name)}'")
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give either steps or epochs")
        if self.batch_size < 1 or self.lr < 0:
            raise ConfigError(f"batch_size must be >= 1 and lr >= 0; got {self.batch_size} and {self.lr}")


@dataclass
class History:
    """What happened: number of steps taken, and the loss `(steps,)` of each."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)


class Batches:
    """Endless global batches of indices; an epoch ends with a smaller batch, as a data loader's does.

    Args:
        n: number of samples.
        lengths: `(n,)` of the samples; those of one batch are then of like length, out of `POOL` batches drawn at random.
    """

    def __init__(self, n: int, config: TrainConfig, generator: torch.Generator, lengths: Tensor | None = None) -> None:
        self.n, self.config, self.generator, self.lengths = n, config, generator, lengths
        self.pending: list[Tensor] = []

    def __next__(self) -> Tensor:
        self.pending = self.pending or self._epoch()
        return self.pending.pop(0)

    def _epoch(self) -> list[Tensor]:
        size = self.config.batch_size
        if self.config.replacement:
            return [torch.randint(self.n, (size,), generator=self.generator)]
        order = torch.randperm(self.n, generator=self.generator)
        if self.lengths is None:
            return list(order.split(size))
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in order.split(POOL * size)]
        ready = [batch for pool in pools for batch in pool.split(size)]
        return [ready[i] for i in torch.randperm(len(ready), generator=self.generator).tolist()]


def steps_of(n: int, config: TrainConfig) -> int:
    """Optimizer steps that a config asks for on `n` samples."""
    return config.steps if config.steps is not None else (config.epochs or 0) * math.ceil(n / config.batch_size)


@contextlib.contextmanager
def trainable(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Let gradients flow to these parameters alone, and put `requires_grad` back afterwards."""
    params = list(params)
    before = {p: p.requires_grad for p in model.parameters()}
    chosen = set(params)
    try:
        for p in before:
            p.requires_grad_(p in chosen)
        yield params
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)
            p.grad = None


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate over steps, held for `schedule_every` steps at a time."""
    periods = max(1, math.ceil(steps / config.schedule_every))

    def factor(step: int) -> float:
        if config.schedule == "constant" or config.lr == 0:
            return 1.0
        t = min(1.0, (step // config.schedule_every) / periods)
        floor = config.lr_end / config.lr
        if config.schedule == "onecycle":
            return WARM_UP + (1 - WARM_UP) * t / 0.2 if t < 0.2 else floor + (1 - floor) * (1 - t) / 0.8
        return floor + (1 - floor) * (1 + math.cos(math.pi * t)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _optimizer(params: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(params, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)


def train(
    task: Task,
    params: Iterable[nn.Parameter],
    config: TrainConfig,
    *,
    objective: Callable[[Batch], Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    after_backward: Callable[[Callable[[], object]], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    stop: Callable[[int], bool] | None = None,
    changed: Sequence[Tensor] = (),
    title: str = "",
) -> History:
    """Train `params` on the task; everything else stays frozen. See the top of the module for the loop.

    Args:
        objective: loss of a batch, a scalar; the mean clean loss if not given.
        penalty: added to the loss, a scalar.
        after_backward: may change gradients before they are clipped and used. It is given a function that adds those of the same batch
            at the weights as they are by then.
        after_step: called with the number of steps done; projections go here.
        stop: called after `after_step`; True ends the training.
        changed: tensors that `after_step` changes in place; a checkpoint keeps them.
        title: label of the progress bar.

    Raises:
        Diverged: the loss became NaN or infinite; names the step.
        DataError: there is nothing to train on.
        OutputError: a checkpoint cannot be written, or is not one of this training.
    """
    if len(task.data) == 0:
        raise DataError("expected at least one clean sample to train on, got none")
    accelerator, history, title = task.accelerator, History(), title or "train"
    steps = steps_of(len(task.data), config)
    stream = Batches(len(task.data), config, task.generator, task.data.lengths)
    losses: list[Tensor] = []
    sent, sign = 0, -1.0 if config.ascend else 1.0

    def backward(parts: list[tuple[Batch, float]]) -> Tensor:
        total = torch.zeros((), device=task.device)
        for part, share in parts:
            with accelerator.autocast():
                clean = objective(part) if objective else task.loss(part).mean()
                loss = sign * clean + (penalty() if penalty else 0.0)
            accelerator.backward(loss * share * accelerator.gradient_accumulation_steps)  # by which accelerate divides it
            total += share * clean.detach()
        task.average(*(p.grad for p in chosen if p.grad is not None))
        return total

    frozen = trainable(task.model, params)
    with (
        stage(task.progress, title) as here,
        frozen as chosen,
        mode(task.model, config.mode),
        task.recomputing(),
        batch_statistics(task.model, accelerator) if config.mode == "train" else contextlib.nullcontext(),
        torch.enable_grad(),
    ):
        # not by `prepare`, which keeps every optimizer for good, and wants one that is sharded with its model
        optimizer = AcceleratedOptimizer(_optimizer(chosen, config), device_placement=False, scaler=accelerator.scaler)
        scheduler = _schedule(optimizer.optimizer, config, steps)
        moving = [*changed, *(task.model.buffers() if config.mode == "train" else ())]
        running = Running(accelerator, task.generator, chosen, moving, optimizer.optimizer, scheduler, stream)
        if here.saved is not None:
            losses, history.steps = running.put(here.saved, here.ended)
            sent = len(losses)
            task.taken[title] += sent
        bar = tqdm(
            total=steps, initial=history.steps, desc=title, delay=1.0, leave=False, disable=None if accelerator.is_main_process else True
        )
        first = steps + 1 if here.ended else history.steps + 1
        with bar:
            for step in range(first, steps + 1):
                parts = _parts(task, fetch(task, next(stream), config.augment), config.mixup)
                losses.append(backward(parts))
                if after_backward:
                    after_backward(functools.partial(backward, parts))
                if config.clip:
                    accelerator.unscale_gradients(optimizer)
                    torch.nn.utils.clip_grad_norm_(chosen, config.clip)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                if step % 20 == 0 or step == steps or task.device.type == "cpu":
                    _check(losses, title)
                    sent = _track(task, title, losses, sent, scheduler)
                history.steps = step
                bar.update()
                if after_step:
                    after_step(step)
                if stop and stop(step):
                    break
                here.step(step, functools.partial(running.state, losses, step))
        here.end(functools.partial(running.left, losses, history.steps))
    _track(task, title, losses, sent, scheduler)
    history.losses = torch.stack(losses).float().tolist()
    return history


def _parts(task: Task, batch: Batch, mixup: bool) -> list[tuple[Batch, float]]:
    """A batch in as many parts as the task runs it in, each with its share of the samples, and mixed if asked."""
    size, parts = len(batch["labels"]), [batch]
    if task.accumulate > 1:
        rows = torch.arange(size, device=batch["labels"].device)
        parts = [part_of(batch, some) for some in rows.tensor_split(min(task.accumulate, size))]
    return [(_mixed(task, part) if mixup else part, len(part["labels"]) / size) for part in parts]


def _mixed(task: Task, batch: Batch) -> Batch:
    size = len(batch["labels"])
    share = torch.rand((), generator=task.generator)  # Beta(1, 1) is uniform
    partner = torch.randperm(size, generator=task.generator).to(task.device)
    return task.adapter.mix(batch, partner, share.to(task.device))


def _track(task: Task, title: str, losses: list[Tensor], sent: int, scheduler: torch.optim.lr_scheduler.LambdaLR) -> int:
    """Send the losses that trackers have not got yet; gives how many they have. Trainings of one name are one curve."""
    if task.accelerator.trackers and len(losses) > sent:
        name = title or "train"
        send_losses(task.accelerator, name, losses[sent:], float(scheduler.get_last_lr()[0]), task.taken[name])
        task.taken[name] += len(losses) - sent
    return len(losses)


def _check(losses: list[Tensor], title: str) -> None:
    """Look at the losses since the last look; on an accelerator rarely, since a look waits for the device."""
    recent = torch.stack(losses[-20:])
    bad = ~torch.isfinite(recent)
    if bad.any():
        step = len(losses) - len(recent) + int(bad.nonzero()[0]) + 1
        raise Diverged(
            f"{title or 'training'}: the loss became {recent[bad][0].item()} at step {step}; lower the learning rate, or check the model's weights"
        )
