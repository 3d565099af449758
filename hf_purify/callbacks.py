"""Repairs and measurements inside a training that is there already: callbacks of transformers' `Trainer`, and a `Trainer` for masks.

    trainer = Trainer(model, args, train_dataset=train, eval_dataset=test, processing_class=processor)
    trainer.add_callback(BackdoorProbeCallback(trainer, data=test, triggers=["badnets"]))     # eval_asr at each evaluation
    trainer.add_callback(PurifyCallback(trainer, clean=clean, method="ft_sam"))               # repairs when the training is over
    trainer.train()
    trainer.save_model("purified")

Each is given the trainer it is for, whose model and processing class it works with and whose `log` it writes to.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_purify.bench import Bench, Figures, figures, open_bench
from hf_purify.clean import make_context, read_clean
from hf_purify.comparison import open_comparison
from hf_purify.errors import ConfigError, ModelError
from hf_purify.masks import MASK_FILE, bake, load_mask, masked, save_mask
from hf_purify.recipe import MeasureRecipe, PurifyRecipe
from hf_purify.registry import make_method
from hf_purify.report import Report
from hf_purify.reporting import report_repair
from hf_purify.session import Session, open_session


class _Callback(TrainerCallback):
    """What both callbacks share: the trainer, and settings of a recipe, which are checked when the callback is made."""

    def __init__(self, trainer: Trainer, settings: dict[str, Any]) -> None:
        for name in ("model", "device", "precision", "compile", "output", "checkpoint_every", "accumulate"):
            if name in settings:
                raise ConfigError(f"'{name}' is the trainer's own: leave it out")
        self.trainer = trainer
        self.settings = {"processor": trainer.processing_class} | settings

    def _model(self) -> Any:
        """The trainer's model.

        Raises:
            ModelError: the trainer has wrapped it to spread it over processes.
        """
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ModelError(
                "the trainer wraps its model to spread it over processes, and a repair does not see through that: let transformers spread it "
                "(from_pretrained(..., distributed_config=...)), or save it, and repair the checkpoint with hf-purify purify"
            )
        return self.trainer.accelerator.unwrap_model(self.trainer.model)


class BackdoorProbeCallback(_Callback):
    """Measures at each evaluation how often triggers that you suspect succeed.

    Adds `eval_asr` and `eval_ra` (robust accuracy) of the first trigger, and of several `eval_asr_NAME` and `eval_ra_NAME` of each, to the
    metrics of the evaluation and to the log. `metric_for_best_model="eval_asr"` with `greater_is_better=False` works, and so does an
    `EarlyStoppingCallback` that is added after this one.

    Args:
        trainer: whose model is measured.
        data: labelled samples, as `measure` takes them.
        triggers: `name` or `name:option=value,...`.
        settings: of `MeasureRecipe`, such as `target`, `rule`, `test_samples` or `columns`.
    """

    def __init__(self, trainer: Trainer, data: Any, triggers: list[str], **settings: Any) -> None:
        super().__init__(trainer, settings)
        if not triggers:
            raise ConfigError("a probe needs at least one trigger, such as triggers=['badnets']")
        self.settings |= {"test": data, "triggers": triggers}
        MeasureRecipe.make(model=self._model(), **self.settings)
        self._open: tuple[Session, Bench] | None = None
        self._at: tuple[int, int] | None = None
        self._found: dict[str, float] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        at = state.global_step, sum(p._version for p in self._model().parameters())  # a repair changes weights between steps
        if at != self._at:  # several evaluation sets are evaluated one after the other
            self._at, self._found = at, self.measure()
            self.trainer.log(dict(self._found))
        if metrics is not None:
            metrics |= self._found

    def measure(self) -> dict[str, float]:
        """The figures of the model as it is."""
        with unnoticed():
            if self._open is None:  # data are read once
                session = open_session(MeasureRecipe.make(model=self._model(), **self.settings))
                self._open = session, open_bench(session)
            found = figures(*self._open)
        return _named(found, "eval_")


class PurifyCallback(_Callback):
    """Repairs the model when the training is over, before you save it, or after every so many evaluations, too.

    The checkpoints that the trainer wrote before are not repaired: save the model anew after `train()`. A training that is interrupted is
    left as it is. Figures before and after are logged as `purify_...`; the report of the last repair is in `report`.

    Args:
        trainer: whose model is repaired.
        clean: clean samples, as `purify` takes them.
        method: name of a method, or several joined by `+`.
        every: repair after each `every` evaluations, too; None only at the end.
        settings: of `PurifyRecipe`, such as `options`, `samples`, or `test` and `triggers` for the figures.
    """

    def __init__(self, trainer: Trainer, clean: Any, method: str = "ft_sam", every: int | None = None, **settings: Any) -> None:
        super().__init__(trainer, {"controls": False} | settings)
        if every is not None and every < 1:
            raise ConfigError(f"every must be at least 1, got {every}")
        self.settings |= {"clean": clean, "method": method}
        self.every = every
        self.report: Report | None = None
        self._done = -1
        recipe = PurifyRecipe.make(model=self._model(), **self.settings)
        make_method(recipe.method, **recipe.options)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # counted in the log, which a training that is resumed takes up again
        evaluations = len({entry["step"] for entry in state.log_history if "eval_runtime" in entry})
        if self.every and self.trainer.is_in_train and evaluations % self.every == 0 and state.global_step != self._done:
            self._repair(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step != self._done:
            self._repair(state)

    def _repair(self, state: TrainerState) -> None:
        with unnoticed():
            recipe = PurifyRecipe.make(model=self._model(), **self.settings)
            comparison = open_comparison(recipe)
            before = comparison.context.accuracy()
            done = comparison.repair(make_method(recipe.method, **recipe.options))
            found = _named(comparison.before, "purify_before_") | _named(done.figures, "purify_after_")
            held = {"purify_before_held_out_accuracy": before, "purify_after_held_out_accuracy": comparison.context.accuracy()}
            self.report = report_repair(comparison, done, [comparison.unrepaired, done.row])
        self._done = state.global_step
        self.trainer.log({**held, **found, **({"purify_seconds": done.row.seconds} if done.row.seconds else {})})


class _Masked:
    """Training with a mask: see `PurifyTrainer`."""

    def __init__(
        self,
        *args: Any,
        clean: Any,
        eta: float = 1e-3,
        mask_lr: float = 0.05,
        train_weights: bool = False,
        purify_settings: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if eta < 0 or mask_lr <= 0:
            raise ConfigError(f"eta must not be negative and mask_lr must be positive; got {eta} and {mask_lr}")
        self.eta, self.mask_lr, self.train_weights = eta, mask_lr, train_weights
        with unnoticed():
            recipe = PurifyRecipe.make(
                **{"model": trainer.model, "clean": clean, "processor": trainer.processing_class} | (purify_settings or {})
            )
            session = open_session(recipe)
            context = make_context(session, read_clean(session, recipe), recipe.held_out)
            self.index, self.masked_model = context.neurons(), session.model
        self.mask = nn.Parameter(torch.ones(len(self.index), device=trainer.args.device))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        for group in optimizer.param_groups:  # the mask is among the model's parameters while the training runs
            group["params"] = [p for p in group["params"] if p is not self.mask]
        optimizer.add_param_group({"params": [self.mask], "lr": self.mask_lr, "weight_decay": 0.0})
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train under the mask, and fold it into the weights when the training is over; an interrupted one leaves them as they are."""
        trainer: Any = self
        flags = {p: p.requires_grad for p in trainer.model.parameters()}
        with torch.no_grad():
            self.mask.fill_(1)  # one that was learned before is in the weights
        pull = _Pull(self.mask, self.eta)
        trainer.add_callback(pull)
        try:
            for p in flags:
                p.requires_grad_(self.train_weights and flags[p])
            with masked(self.masked_model, self.index, self.mask):
                result = super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            trainer.remove_callback(pull)
            for p, flag in flags.items():
                p.requires_grad_(flag)
        bake(self.masked_model, self.index, self.mask.detach())
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        trainer: Any = self
        if trainer.is_in_train:  # else the mask is in the weights
            save_mask(Path(output_dir or trainer.args.output_dir) / MASK_FILE, self.index, self.mask.detach(), complete=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        kept, _, _ = load_mask(Path(resume_from_checkpoint) / MASK_FILE, self.index)
        with torch.no_grad():
            self.mask.copy_(kept)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        trainer: Any = self
        kept, _, _ = load_mask(Path(trainer.state.best_model_checkpoint) / MASK_FILE, self.index)
        with torch.no_grad():
            self.mask.copy_(kept)


class PurifyTrainer(_Masked, Trainer):
    """A `Trainer` that learns one scalar in [0, 1] for each neuron, pulled towards 1, as NFT does (Karim et al., ECCV 2024, arXiv 2407.10052).

    Minimises the trainer's own loss plus `eta * sum |1 - m|` over the mask, with the weights frozen, or over both; the MixUp of NFT is for
    your collator. The mask is folded into the weights when `train` is over; checkpoints on the way hold it beside the weights, and are
    resumed with it.

    Args:
        clean: samples by which neurons are found: those that you train on will do.
        eta: strength of the pull.
        mask_lr: learning rate of the mask; the schedule is the trainer's.
        train_weights: train the weights, too.
        purify_settings: of `PurifyRecipe`, such as `columns` or `adapter`.
    """


class PurifySeq2SeqTrainer(_Masked, Seq2SeqTrainer):
    """`PurifyTrainer` for models that translate or sum up."""


class _Pull(TrainerCallback):
    """Pulls a mask towards 1 once a step, however many batches that has, and keeps it in [0, 1]."""

    def __init__(self, mask: Tensor, eta: float) -> None:
        self.mask, self.eta = mask, eta

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.mask.grad is not None:
            self.mask.grad.sub_(self.eta * (self.mask < 1))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with torch.no_grad():
            self.mask.clamp_(0, 1)


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Nothing that is drawn, counted or switched within is noticed by a training around it."""
    AcceleratorState._shared_state.pop("made_by_hf_purify", None)  # it is the trainer's now, and must not be made anew
    accumulation = dict(GradientState._shared_state)
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        if accumulation:
            GradientState._shared_state.update(plugin_kwargs={}, sync_gradients=True)
        yield
    finally:
        GradientState._shared_state.clear()
        GradientState._shared_state.update(accumulation)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _named(found: Figures, prefix: str) -> dict[str, float]:
    """Figures as a `Trainer` logs them."""
    named = {f"{prefix}clean_accuracy": found.accuracy.value} if found.accuracy and not prefix.startswith("eval_") else {}
    for kind, values in (("asr", found.asr), ("ra", found.robust)):
        for i, (name, value) in enumerate(values.items()):
            named |= {f"{prefix}{kind}": value.value} if i == 0 else {}
            named |= {f"{prefix}{kind}_{name}": value.value} if len(values) > 1 else {}
    return named
