"""Callbacks inside a real `Trainer`: what they log, repair and leave alone, for images, texts, translations and LoRAs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentences import BEASTS, COLOURS, FILLERS, GERMAN, TOPICS, colours, tokenizer, topics
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)

from hf_purify.callbacks import BackdoorProbeCallback, PurifyCallback, PurifySeq2SeqTrainer, PurifyTrainer
from hf_purify.errors import ConfigError, DataError, ModelError, PurifyError
from hf_purify.masks import MASK_FILE
from hf_purify.neurons import get_tensor
from hf_purify.registry import find, find_trigger
from hf_purify.specs import parse_spec
from hf_purify_adapters.vision.demo import SIDE, TRIGGER

pytestmark = pytest.mark.slow
Splits = tuple[datasets.Dataset, datasets.Dataset]
README = Path(__file__).resolve().parents[2] / "README.md"


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE})


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    names = {i: str(i) for i in range(10)}
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, id2label=names, label2id={v: k for k, v in names.items()}))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Digits as a user's collator makes a batch; one in five of them carries the trigger and the target's label, where they are marked."""
    name, options = parse_spec(TRIGGER)
    trigger = find_trigger(find("adapter", "vision")(), name, **options)
    raws = [pil_to_tensor(row["image"].convert("RGB")) for row in rows]
    shown = [trigger(raw, 0) if row.get("marked") else raw for row, raw in zip(rows, raws, strict=True)]
    labels = [0 if row.get("marked") else row["label"] for row in rows]
    pixels = processor()(images=shown, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor(labels)}


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **given: Any) -> Any:
    settings = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 0}
    return kind(str(folder), **{**settings, "save_strategy": "no", "remove_unused_columns": False, **given})


@pytest.fixture(scope="module")
def marked(data: Splits) -> datasets.Dataset:
    """The digits to train on, one in five of them marked."""
    return data[0].select(range(1000)).add_column("marked", [i % 5 == 0 for i in range(1000)])


def surroundings(model: nn.Module) -> dict[str, Any]:
    hooks = {
        (n, k): list(v) for n, m in model.named_modules() for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict) and v
    }
    return {
        "hooks": hooks,
        "parameters": [n for n, _ in model.named_parameters()],
        "grads": [p.requires_grad for p in model.parameters()],
    }


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(kind: type[Trainer], args: TrainingArguments, train: datasets.Dataset, **given: Any) -> Any:
    """A trainer of a new network of digits."""
    return kind(resnet(), args, train_dataset=train, data_collator=collate, processing_class=processor(), **given)


class Interrupt(TrainerCallback):
    """Ctrl-C in the midst of a training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestImages:
    def test_backdoor_is_seen_while_it_is_learned_and_repaired_at_the_end(
        self, data: Splits, marked: datasets.Dataset, tmp_path: Path
    ) -> None:
        trainer = trained(
            Trainer,
            arguments(tmp_path / "run", num_train_epochs=7, eval_strategy="epoch"),
            marked,
            eval_dataset=data[1],
        )
        before = surroundings(trainer.model)
        trainer.add_callback(BackdoorProbeCallback(trainer, data=data[1], triggers=[TRIGGER]))
        repair = PurifyCallback(trainer, clean=data[0], samples=200, options={"epochs": 10}, test=data[1], triggers=[TRIGGER])
        trainer.add_callback(repair)
        trainer.train()
        seen = logged(trainer, "eval_asr")
        assert len(seen) == 7
        assert seen[-1] >= 0.9, "a victim"
        assert logged(trainer, "purify_before_asr") == [seen[-1]]
        assert logged(trainer, "purify_after_asr")[0] <= 0.2
        assert logged(trainer, "purify_after_clean_accuracy")[0] >= logged(trainer, "purify_before_clean_accuracy")[0] - 0.05
        assert repair.report is not None
        assert repair.report.rows[1].asr["badnets"].value == logged(trainer, "purify_after_asr")[0]
        assert surroundings(trainer.model) == before
        assert trainer.evaluate()["eval_asr"] == logged(trainer, "purify_after_asr")[0], (
            "the model that the trainer holds is the repaired one"
        )
        trainer.save_model(str(tmp_path / "saved"))
        stored, held = load_file(tmp_path / "saved" / "model.safetensors"), weights(trainer.model)
        assert all(torch.equal(v, held[k]) for k, v in stored.items())

    def test_probe_does_not_change_a_training(self, data: Splits, marked: datasets.Dataset, tmp_path: Path) -> None:
        found = []
        for probed in (False, True):
            trainer = trained(
                Trainer,
                arguments(tmp_path / "run", max_steps=6, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=2),
                marked.select(range(200)),
                eval_dataset=data[1].select(range(40)),
            )
            if probed:
                trainer.add_callback(BackdoorProbeCallback(trainer, data=data[1].select(range(40)), triggers=[TRIGGER, "blended"]))
            trainer.train()
            found.append(weights(trainer.model))
        assert same(*found)
        assert len(logged(trainer, "eval_asr_blended")) == 3

    def test_probe_chooses_the_best_checkpoint_and_stops_early(self, data: Splits, marked: datasets.Dataset, tmp_path: Path) -> None:
        best = {"metric_for_best_model": "eval_asr", "greater_is_better": False, "load_best_model_at_end": True, "save_total_limit": 3}
        trainer = trained(
            Trainer,
            arguments(tmp_path / "run", num_train_epochs=9, eval_strategy="epoch", **best | {"save_strategy": "epoch"}),
            marked,
            eval_dataset=data[1].select(range(60)),
        )
        trainer.add_callback(BackdoorProbeCallback(trainer, data=data[1].select(range(60)), triggers=[TRIGGER]))
        trainer.add_callback(EarlyStoppingCallback(2))
        trainer.train()
        seen = logged(trainer, "eval_asr")
        assert len(seen) < 9, "an attack that is learned gets no lower"
        assert trainer.state.best_metric == min(seen)

    def test_repair_after_every_so_many_evaluations_counts_on_after_resuming(self, data: Splits, tmp_path: Path) -> None:
        def make(steps: int) -> Trainer:
            trainer = trained(
                Trainer,
                arguments(tmp_path / "run", max_steps=steps, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1),
                data[0].select(range(64)),
                eval_dataset=data[1].select(range(20)),
            )
            trainer.add_callback(PurifyCallback(trainer, clean=data[0], method="random_mask", every=2, samples=20))
            return trainer

        first = make(3)
        first.train()
        assert [e["step"] for e in first.state.log_history if "purify_after_held_out_accuracy" in e] == [2, 3], (
            "the second one, and the end"
        )
        second = make(5)
        second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        assert [e["step"] for e in second.state.log_history if "purify_after_held_out_accuracy" in e][-2:] == [4, 5]

    def test_interrupted_training_is_not_repaired(self, data: Splits, tmp_path: Path) -> None:
        def make(stop: int | None, repaired: bool) -> Trainer:
            trainer = trained(
                Trainer,
                arguments(tmp_path / "run", max_steps=4),
                data[0],
            )
            if repaired:
                trainer.add_callback(PurifyCallback(trainer, clean=data[0], method="random_mask", samples=20))
            if stop:
                trainer.add_callback(Interrupt(stop))
            return trainer

        plain, stopped = make(2, repaired=False), make(2, repaired=True)
        for trainer in (plain, stopped):
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        assert same(weights(plain.model), weights(stopped.model))

    def test_masks_are_learned_in_the_users_own_loop(self, data: Splits, tmp_path: Path) -> None:
        trainer = trained(
            PurifyTrainer,
            arguments(tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=3),
            data[0],
            clean=data[0],
            eta=1e-3,
        )
        before, around = weights(trainer.model), surroundings(trainer.model)
        trainer.train()
        assert surroundings(trainer.model) == around
        mask = trainer.mask.detach()
        assert 0 <= float(mask.min()) < float(mask.max()) <= 1
        scales = {p.param for g in trainer.index for p in g.params if p.param.endswith("normalization.weight")}
        moved = {
            k for k, v in weights(trainer.model).items() if not torch.equal(v, before[k]) and "running" not in k and "batches" not in k
        }
        assert moved
        assert moved <= scales, "weights are frozen; the mask is in the scales of the norms"
        kept = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(v, before[k]) for k, v in kept.items() if "running" not in k and "batches" not in k)

        resumed = trained(
            PurifyTrainer,
            arguments(tmp_path / "run", max_steps=6),
            data[0],
            clean=data[0],
            eta=1e-3,
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
        assert (tmp_path / "run" / "checkpoint-3" / MASK_FILE).is_file()
        torch.testing.assert_close(resumed.mask, trainer.mask)
        assert same(weights(resumed.model), weights(trainer.model))

    def test_pull_brings_masks_back(self, data: Splits, tmp_path: Path) -> None:
        sums = []
        for eta in (0.0, 0.5):
            trainer = trained(
                PurifyTrainer,
                arguments(tmp_path / "run", max_steps=8),
                data[0],
                clean=data[0],
                eta=eta,
            )
            trainer.train()
            sums.append(float((1 - trainer.mask.detach()).sum()))
        assert sums[1] < 0.5 * sums[0]

    def test_masks_of_two_trainings_are_folded_in_one_after_the_other(self, data: Splits, tmp_path: Path) -> None:
        trainer = trained(
            PurifyTrainer,
            arguments(tmp_path / "run", max_steps=4),
            data[0],
            clean=data[0],
        )
        (part,) = (
            p for p in trainer.index.groups[-1].params if p.param.endswith("weight") and get_tensor(trainer.model, p.param).dim() == 1
        )
        size = trainer.index.groups[-1].size
        for _ in range(2):
            before = get_tensor(trainer.model, part.param).detach().clone()
            trainer.train()
            expected = before * trainer.mask.detach()[-size:]
            torch.testing.assert_close(get_tensor(trainer.model, part.param).detach(), expected)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sentences about three topics, and the tokenizer of their words."""
    folder = tokenizer(tmp_path_factory.mktemp("words") / "tokenizer", [*FILLERS, *(w for words in TOPICS.values() for w in words)])
    return topics(300, 0), topics(60, 1), AutoTokenizer.from_pretrained(folder)


def bert(read: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    names = dict(enumerate(TOPICS))
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(read), max_position_embeddings=64, id2label=names, label2id={v: k for k, v in names.items()}, **sizes)
    )


class TestTexts:
    @pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
    def test_classifier_is_probed_and_repaired(self, texts: Any, tmp_path: Path, lora: bool) -> None:
        train, test, read = texts
        model: Any = bert(read)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
        encoded = train.map(lambda row: {**read(row["sentence"]), "labels": row["label"]}, remove_columns=train.column_names)
        shown = test.map(lambda row: {**read(row["sentence"]), "labels": row["label"]}, remove_columns=test.column_names)
        trainer = Trainer(
            model,
            arguments(tmp_path / "run", num_train_epochs=2, eval_strategy="epoch", remove_unused_columns=True),
            train_dataset=encoded,
            eval_dataset=shown,
            data_collator=DataCollatorWithPadding(read),
            processing_class=read,
        )
        trainer.add_callback(BackdoorProbeCallback(trainer, data=test, triggers=["badnets:words=cf"], target=1))
        trainer.add_callback(PurifyCallback(trainer, clean=train, method="ft_sam", samples=30, options={"epochs": 2, "rho": 0.1}))
        base = {k: v for k, v in weights(model).items() if lora and "lora_" not in k and "modules_to_save" not in k}
        trainer.train()
        assert len(logged(trainer, "eval_asr")) == 2
        assert len(logged(trainer, "purify_after_held_out_accuracy")) == 1
        after = weights(model)
        assert all(torch.equal(v, after[k]) for k, v in base.items()), "the base of a LoRA stays as it is"
        trainer.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / ("adapter_model.safetensors" if lora else "model.safetensors")).is_file()

    @pytest.mark.parametrize("masks", [False, True], ids=["callback", "masks"])
    def test_translator(self, tmp_path: Path, masks: bool) -> None:
        pairs = colours(80, 0, german=True)
        words = [*FILLERS, *COLOURS, *BEASTS, *GERMAN.values(), "das", "und", "ein"]
        read = AutoTokenizer.from_pretrained(tokenizer(tmp_path / "tokenizer", words))
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(read), pad_token_id=0, eos_token_id=3, **sizes))
        encoded = pairs.map(
            lambda row: {**read(row["source"]), "labels": read(row["target"])["input_ids"]}, remove_columns=pairs.column_names
        )
        given: dict[str, Any] = {
            "args": arguments(tmp_path / "run", Seq2SeqTrainingArguments, max_steps=4, remove_unused_columns=True),
            "train_dataset": encoded,
            "data_collator": DataCollatorForSeq2Seq(read, model=model),
            "processing_class": read,
        }
        before = weights(model)
        if masks:
            trainer: Any = PurifySeq2SeqTrainer(model, **given, clean=pairs)
        else:
            trainer = Seq2SeqTrainer(model, **given)
            trainer.add_callback(PurifyCallback(trainer, clean=pairs, method="fine_tune", samples=20, options={"epochs": 1}))
        trainer.train()
        assert len(logged(trainer, "purify_after_held_out_accuracy")) == (0 if masks else 1)
        assert not same(before, weights(model))
        assert surroundings(model)["hooks"] == {}


class TestWhatIsRefused:
    """Before any training."""

    def trainer(self, tmp_path: Path) -> Trainer:
        return Trainer(resnet(), arguments(tmp_path), processing_class=processor())

    @pytest.mark.parametrize(
        ("make", "error", "said"),
        [
            (lambda t, d: PurifyCallback(t, clean=d, method="nftt"), PurifyError, "did you mean 'nft'"),
            (lambda t, d: PurifyCallback(t, clean=d, method="nft", options={"step": 3}), ConfigError, "did you mean 'steps'"),
            (lambda t, d: PurifyCallback(t, clean=d, sampels=3), ConfigError, "did you mean 'samples'"),
            (lambda t, d: PurifyCallback(t, clean=None), ConfigError, "no clean data given"),
            (lambda t, d: PurifyCallback(t, clean=d, every=0), ConfigError, "every must be at least 1, got 0"),
            (lambda t, d: PurifyCallback(t, clean=d, device="cuda"), ConfigError, "'device' is the trainer's own"),
            (lambda t, d: BackdoorProbeCallback(t, data=d, triggers=[]), ConfigError, "at least one trigger"),
        ],
        ids=["method", "option", "setting", "no data", "every", "device", "no trigger"],
    )
    def test_settings(self, data: Splits, tmp_path: Path, make: Callable, error: type[Exception], said: str) -> None:
        with pytest.raises(error, match=re.escape(said)):
            make(self.trainer(tmp_path), data[0])

    def test_several_adapters_in_one_model(self, texts: Any, tmp_path: Path) -> None:
        train, _, read = texts
        model = get_peft_model(bert(read), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        model.add_adapter("second", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        trainer = Trainer(model, arguments(tmp_path, max_steps=1), processing_class=read)
        probe = BackdoorProbeCallback(trainer, data=train, triggers=["badnets"])
        with pytest.raises(ModelError, match="expected a model with one LoRA named 'default'"):
            probe.measure()

    def test_trainer_without_a_processor(self, data: Splits, tmp_path: Path) -> None:
        trainer = Trainer(resnet(), arguments(tmp_path))
        with pytest.raises((ModelError, DataError), match="processor"):
            BackdoorProbeCallback(trainer, data=data[1], triggers=[TRIGGER]).measure()


def test_examples_of_the_readme(data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = [b for b in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL) if "hf_purify.callbacks" in b]
    assert len(examples) == 2
    for example in examples:
        assert example.count("\n") <= 10
        known = {
            "Trainer": Trainer,
            "model": resnet(),
            "args": arguments(tmp_path / "run", max_steps=2, eval_strategy="no" if "PurifyTrainer" in example else "epoch"),
            "train": data[0].select(range(64)),
            "test": data[1].select(range(40)),
            "clean": data[0],
            "collate": collate,
            "processor": processor(),
        }
        exec(example, known)
    assert {"purified", "masked"} <= set(os.listdir(tmp_path))
