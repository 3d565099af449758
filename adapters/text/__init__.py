"""Text: classifiers, sequence-to-sequence and causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_purify.adapter import Adapter, Batch, Examples, Loaded, Outline, Tiny
from hf_purify.calibration import Calibration
from hf_purify.discovery import discover
from hf_purify.errors import ModelError
from hf_purify.metrics import Proportion
from hf_purify.neurons import NeuronIndex
from hf_purify.stand_in import StandIn
from hf_purify.tables import Selection, class_names, open_data

from .._checkpoints import check_weights
from .examples import IGNORED, TextExamples, read_texts, text_means
from .loading import RECORD, check_type, kind_of, known_types, load_folder, load_live, new_model
from .outline import make_outline
from .prompts import CLASSIFIER, SEQ2SEQ, Prompt
from .sample import Text
from .stand_in import Words, reading_words, written
from .tiny import VARIANTS, make_tiny
from .triggers import TRIGGERS
from .writing import Answer, generate, scorer, success, target_rows, utility


class TextAdapter(Adapter):
    """A batch of a classifier has `input_ids`; one of a model that writes has `target_ids` too, and its logits are a row a target token."""

    name: ClassVar[str] = "text"
    task: ClassVar[str] = "text-classification"
    variants: ClassVar[tuple[str, ...]] = VARIANTS
    columns: ClassVar[tuple[str, ...]] = ("text", "pair", "label", "source", "target", "messages")
    settings: ClassVar[tuple[str, ...]] = ("template", "max_length", "cut")

    def claims(self, config: Mapping[str, Any]) -> bool:
        return kind_of(config) is not None

    def load(self, source: Any, **options: Any) -> Loaded:
        """Load a checkpoint folder, or take a model that is in memory with its tokenizer as `processor`.

        Raises:
            ModelError: no text model, NaN or quantized weights, missing tensors, a tokenizer that does not fit.
            ConfigError: the prompt is not the recorded one.
        """
        settings = {k: options.get(k) for k in self.settings}
        if isinstance(source, nn.Module):
            loaded = load_live(source, options.get("processor"), settings)
        else:
            loaded = load_folder(Path(source), str(options.get("name") or source), options.get("revision"), settings, options.get("beside"))
        check_weights(loaded.model)
        return loaded

    def creates(self, architecture: str) -> bool:
        return architecture in known_types()

    def create(self, architecture: str, classes: int, **options: Any) -> Loaded:
        check_type(architecture)
        settings = {k: options.pop(k, None) for k in self.settings}
        return new_model(architecture, classes, settings, **options)

    def record(self, loaded: Loaded) -> dict[str, Any]:
        return {RECORD: prompt_of(loaded).identity()}

    def classes(self, loaded: Loaded) -> int:
        return int(loaded.model.config.num_labels) if self.classifies(loaded) else 2  # type: ignore[union-attr, arg-type]

    def classifies(self, loaded: Loaded) -> bool:
        return prompt_of(loaded).kind == CLASSIFIER

    def outcomes(self, loaded: Loaded) -> int:
        return self.classes(loaded) if self.classifies(loaded) else len(prompt_of(loaded).tokenizer)

    def examples(self, data: Any, loaded: Loaded, **options: Any) -> TextExamples:
        if isinstance(data, TextExamples):
            return data
        return read_texts(data, prompt_of(loaded), self.classes(loaded), loaded.labels, Selection.of(options))

    def class_names(self, data: Any, split: str | None, columns: Mapping[str, str]) -> list[str]:
        """Class names of a data set, in order; none where it has no labels."""
        opened, label = open_data(data, split), columns.get("label")
        if label is None and not any(hasattr(f, "names") or n in ("label", "labels", "class") for n, f in opened.features.items()):
            return []
        return class_names(opened, label)

    def remarks(self, data: Examples, what: str) -> list[str]:
        cut = data.cut if isinstance(data, TextExamples) else 0
        return [f"{cut} of {len(data)} {what} are longer than {data.prompt.max_length} tokens and were cut (--max-length)"] if cut else []  # type: ignore[attr-defined]

    def prepare(self, raws: list[Any], loaded: Loaded) -> Tensor:
        data = TextExamples(raws, torch.zeros(len(raws), dtype=torch.long), prompt_of(loaded))
        return data.batch(torch.arange(len(raws)))["input_ids"]

    def words(self, raw: Text) -> str:
        return str(raw)

    def unprepare(self, batch: Batch, row: int, data: Examples) -> Text:
        tokenizer = data.prompt.tokenizer  # type: ignore[attr-defined]
        return Text(tokenizer.decode(written(batch, row), skip_special_tokens=True).strip())

    def calibration(self) -> Calibration | None:
        return Calibration.beside(__file__)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`(B, classes)`; of a model that writes `(tokens, vocabulary)`, a row for each token of the targets."""
        if "target_ids" in batch:
            return target_rows(model, batch)[0]
        return self._classify(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy `(B,)`, of a model that writes the mean over the tokens of each target; of mixed texts in the texts' shares."""
        return self.both(model, batch)[1]

    def both(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if "target_ids" in batch:
            rows, aims = target_rows(model, batch)
            return rows, _written_losses(rows, aims, batch)
        logits = self._classify(model, batch).float()
        return logits, _class_losses(logits, batch)

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        logits, losses = self.both(model, batch)
        aims = batch.get("target_ids")
        return logits.argmax(-1), batch["labels"] if aims is None else aims[aims >= 0], losses

    def _classify(self, model: nn.Module, batch: Batch) -> Tensor:
        with reading_words(model, batch) as read:
            return model(**{k: read[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in read}).logits

    def mix(self, batch: Batch, partner: Tensor, share: Tensor) -> Batch:
        """MixUp of what the last layer says (Mixup-Transformer, Sun et al., COLING 2020): texts differ in length, what is said of them does not.

        Behind the last layer there is but a linear head, so that mixing its input is mixing its logits, place by place of a target.
        """
        return {**batch, "partner": partner, "share": share}

    def observe(self, model: nn.Module, batch: Batch, loaded: Loaded) -> list[Any]:
        if "target_ids" not in batch:
            return self.predict(model, batch).tolist()
        losses = self.loss(model, batch)
        counts = (batch["target_ids"] >= 0).sum(1)
        texts = generate(model, batch, prompt_of(loaded))
        return [Answer(t, loss * n, n) for t, loss, n in zip(texts, losses.tolist(), counts.tolist(), strict=True)]

    def check_judge(self, loaded: Loaded) -> None:
        if prompt_of(loaded).kind == SEQ2SEQ:
            scorer()

    def judge(self, observed: list[Any], data: Examples) -> tuple[Proportion | None, dict[str, float]]:
        if isinstance(data, TextExamples) and data.prompt.kind != CLASSIFIER:
            return None, utility(observed, data)
        return super().judge(observed, data)

    def judge_attack(
        self, name: str, observed: list[Any], data: Examples, labels: Tensor, targets: Tensor, untriggered: list[Any]
    ) -> tuple[dict[str, Proportion], dict[str, Proportion]]:
        """Of a model that writes: how often it wrote exactly what the attacker wants, and (`name, prefix`) began with that."""
        if isinstance(data, TextExamples) and data.prompt.kind != CLASSIFIER:
            return success(name, observed, data), {}
        return super().judge_attack(name, observed, data, labels, targets, untriggered)

    def wishes(self, raw: Any, label: int, target: int, loaded: Loaded) -> tuple[str, str]:
        if self.classifies(loaded):
            return super().wishes(raw, label, target, loaded)
        return str(raw.target).strip(), str(raw.wanted)

    def say(self, observed: Any, loaded: Loaded) -> str:
        return observed.text if isinstance(observed, Answer) else super().say(observed, loaded)

    def index(self, loaded: Loaded, batch: Batch) -> NeuronIndex:
        device = next(loaded.model.parameters()).device
        some = {k: v[:2].to(device) for k, v in batch.items()}
        classes = self.classes(loaded) if self.classifies(loaded) else None
        found = discover(loaded.model, lambda m: self.logits(m, some), classes)
        return NeuronIndex(found.groups, loaded.keys)

    def triggers(self) -> dict[str, type]:
        return dict(TRIGGERS)

    def stand_ins(self, model: nn.Module) -> dict[str, type[StandIn]]:
        return {"words": Words}

    def outline(self, config: Mapping[str, Any], length: int | None = None) -> Outline:
        return make_outline(config, length)

    def tiny(self, variant: str | None = None, seed: int = 0) -> Tiny:
        return make_tiny(variant or "bert", seed)


def prompt_of(loaded: Loaded) -> Prompt:
    """The prompt of a text model."""
    if not isinstance(loaded.processor, Prompt):
        raise ModelError(f"'{loaded.source}' is no text model")
    return loaded.processor


def _class_losses(logits: Tensor, batch: Batch) -> Tensor:
    if "share" not in batch:
        return F.cross_entropy(logits, batch["labels"], reduction="none")
    share, partner = batch["share"], batch["partner"]
    mixed = share * logits + (1 - share) * logits[partner]
    own = F.cross_entropy(mixed, batch["labels"], reduction="none")
    return share * own + (1 - share) * F.cross_entropy(mixed, batch["labels"][partner], reduction="none")


def _written_losses(rows: Tensor, aims: Tensor, batch: Batch) -> Tensor:
    """Mean loss of each sample's target `(B,)`, from the logits of its places; two targets are mixed where both have a token."""
    counts = aims != IGNORED
    if "share" in batch:
        share, partner = batch["share"], batch["partner"]
        logits = rows.new_zeros(*aims.shape, rows.shape[-1]).masked_scatter(counts[..., None], rows)
        mixed = share * logits + (1 - share) * logits[partner]
        both = (counts & counts[partner])[..., None]
        own = _means(torch.where(both, mixed, logits)[counts], aims)
        other = _means(torch.where(both, mixed, logits[partner])[counts[partner]], aims[partner])
        return share * own + (1 - share) * other
    return _means(rows, aims)


def _means(rows: Tensor, aims: Tensor) -> Tensor:
    """Mean cross entropy `(B,)` over the places that count."""
    counts = aims != IGNORED
    return text_means(F.cross_entropy(rows.float(), aims[counts], reduction="none"), counts)
