"""What a training needs to go on: its state, taken and put back, wherever its tensors lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_purify.sharding import like, local, whole


@dataclass
class State:
    """What a training needs to go on, or what it left: tensors on the CPU, and values that JSON keeps exactly."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types and values; of what is spread over processes, of this one's part."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        mine = local(value).cpu().contiguous()
        found.update(f"{name} {mine.dtype} {tuple(mine.shape)}".encode())
        found.update(mine.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def random_state(accelerator: Accelerator, generator: torch.Generator) -> dict[str, Tensor]:
    """All generators: the job's, and torch's own on each process, `(processes, ...)`."""
    own = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    every = {f"random/{k}": accelerator.gather(v[None].to(accelerator.device)).cpu() for k, v in own.items()}
    return every | {"generator": generator.get_state()}


def put_random_state(accelerator: Accelerator, generator: torch.Generator, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `random_state`."""
    generator.set_state(tensors["generator"])
    torch.set_rng_state(tensors["random/cpu"][accelerator.process_index].clone())  # torch reads from the start of its storage
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"][accelerator.process_index].clone(), accelerator.device)


def copies(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU of the main process, which alone keeps them, of tensors that may be spread over all."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)  # on all processes, one tensor at a time
        if accelerator.is_main_process:
            found[name] = value.to("cpu", copy=True)
    return found


def numbered(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors as `name/0`, `name/1`, ..."""
    return {f"{name}/{i}": t for i, t in enumerate(tensors)}


@torch.no_grad()
def put_copies(tensors: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """The inverse of `copies`, in place, on all processes."""
    for name, target in tensors.items():
        target.copy_(like(target, found[name]))


class Running:
    """A training with everything that a checkpoint keeps of it: what is trained, the optimizer, its schedule, all generators, and the data.

    Args:
        trained: parameters that move.
        others: tensors that move with them: statistics of batch norms, and what callbacks change in place.
        stream: of batches; its `pending` are those that were drawn already.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        generator: torch.Generator,
        trained: Sequence[nn.Parameter],
        others: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        stream: Any,
    ) -> None:
        self.accelerator, self.generator, self.trained = accelerator, generator, trained
        self.optimizer, self.scheduler, self.stream = optimizer, scheduler, stream
        self.moving = numbered("trained", trained) | numbered("others", others)

    def left(self, losses: Sequence[Tensor], steps: int) -> State:
        """What stays of the training when it has ended."""
        tensors = copies(self.accelerator, self.moving) | random_state(self.accelerator, self.generator)
        return State(tensors | {"losses": torch.stack(list(losses)).float().cpu()}, {"steps": steps})

    def state(self, losses: Sequence[Tensor], steps: int) -> State:
        """What it needs to go on."""
        found = self.left(losses, steps)
        for i, p in enumerate(self.trained):
            own = {f"optimizer/{i}/{k}": v for k, v in self.optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
            found.tensors |= copies(self.accelerator, own)
        waiting = self.stream.pending
        found.tensors["pending"] = torch.cat([torch.zeros(0, dtype=torch.long), *waiting])
        found.values |= {"pending": [len(w) for w in waiting], "lr": [g["lr"] for g in self.optimizer.param_groups]}
        if self.accelerator.scaler is not None:
            found.values["scaler"] = self.accelerator.scaler.state_dict()
        return found

    def put(self, state: State, ended: bool) -> tuple[list[Tensor], int]:
        """Take up a state; gives the losses so far and the steps done."""
        tensors, values = state.tensors, state.values
        put_copies(self.moving, tensors)
        put_random_state(self.accelerator, self.generator, tensors)
        losses = list(tensors["losses"].to(self.accelerator.device).unbind())
        if ended:
            return losses, values["steps"]
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer":
                i, _, name = rest.partition("/")
                p = self.trained[int(i)]
                self.optimizer.state[p][name] = like(p, value) if value.dim() else value  # counts of steps stay on the CPU
        for group, lr in zip(self.optimizer.param_groups, values["lr"], strict=True):
            group["lr"] = lr
        self.scheduler.last_epoch, self.scheduler._last_lr = values["steps"], values["lr"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.stream.pending = list(tensors["pending"].split(values["pending"]))
        return losses, values["steps"]
