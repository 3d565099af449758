"""Text models of transformers: loading them with their tokenizers, new ones, adapters of PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ConfigError, ModelError, did_you_mean, first_line

from .._checkpoints import class_labels, load_model, of_live, read_config, read_head, read_records, saver, transformers_keys
from .prompts import CAUSAL, CLASSIFIER, LONGEST, SEQ2SEQ, Prompt

TASKS = {CLASSIFIER: "text-classification", SEQ2SEQ: "text2text-generation", CAUSAL: "text-generation"}
PEFT_TASKS = {"SEQ_CLS": CLASSIFIER, "SEQ_2_SEQ_LM": SEQ2SEQ, "CAUSAL_LM": CAUSAL}
RECORD = "hf_purify_prompt"  # key in config.json: the prompt that a victim was made or a repair was chosen with


def auto_class(kind: str) -> Any:
    import transformers

    names = {CLASSIFIER: "AutoModelForSequenceClassification", SEQ2SEQ: "AutoModelForSeq2SeqLM", CAUSAL: "AutoModelForCausalLM"}
    return getattr(transformers, names[kind])


def kind_of(config: Mapping[str, Any]) -> str | None:
    """What a checkpoint with this `config.json` does, from the architecture that it names; None where that is nothing with text.

    With an adapter, its `task_type` says so, whatever its base was trained for.
    """
    if config.get("task_type") in PEFT_TASKS:
        return PEFT_TASKS[config["task_type"]]
    for name in config.get("architectures") or []:
        if "ForSequenceClassification" in name:
            return CLASSIFIER
        if config.get("is_encoder_decoder") and ("ConditionalGeneration" in name or name.endswith(("MTModel", "MarianMTModel"))):
            return SEQ2SEQ
        if name.endswith(("ForCausalLM", "LMHeadModel", "LMHead")):
            return CAUSAL
    return None


def load_folder(folder: Path, source: str, revision: str | None, settings: Mapping[str, Any], beside: Path | None = None) -> Loaded:
    """Load a checkpoint folder; the tokenizer and the prompt of an adapter that lies in `beside` come before its own."""
    config = read_config(folder)
    head = read_head(beside) if beside else None
    kind = CLASSIFIER if head else kind_of(config)
    if kind is None:
        listed = ", ".join(config.get("architectures") or []) or "nothing"
        raise ModelError(
            f"'{source}' is no text model that can be repaired: its config names {listed}; expected an architecture ForSequenceClassification, "
            "ForConditionalGeneration or ForCausalLM"
        )
    model = load_model(folder, source, auto_class(kind), f"{kind} model", head)
    own = beside is not None and (beside / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(beside if beside and own else folder, source)
    recorded = read_records(beside).get(RECORD) if beside else None
    prompt = make_prompt(tokenizer, kind, model, settings, recorded or config.get(RECORD), str(beside) if recorded else source)
    labels = class_labels(model.config) if kind == CLASSIFIER else []
    if kind == CLASSIFIER:
        check_classes(model.config, prompt, source)
    return Loaded(
        model, prompt, labels, source, "transformers", revision, folder, transformers_keys(model), saver(folder), task=TASKS[kind]
    )


def load_live(model: nn.Module, tokenizer: Any, settings: Mapping[str, Any]) -> Loaded:
    """A model that is in memory already, such as a `Trainer`'s, with its tokenizer.

    Raises:
        ModelError: no text model of transformers, or no tokenizer.
    """
    config = getattr(model, "config", None)
    kind = kind_of(
        {"architectures": [type(model).__name__.removeprefix("FSDP")], "is_encoder_decoder": getattr(config, "is_encoder_decoder", False)}
    )
    if kind is None:
        raise ModelError(
            f"expected a text model of transformers ForSequenceClassification, ForConditionalGeneration or ForCausalLM, got {type(model).__name__}"
        )
    if not hasattr(tokenizer, "all_special_ids"):
        raise ModelError(f"a text model needs its tokenizer: processor=..., got {type(tokenizer).__name__}")
    made = of_live(model, tokenizer)
    prompt = make_prompt(tokenizer, kind, model, settings, getattr(config, RECORD, None), made.source)
    if kind == CLASSIFIER:
        check_classes(config, prompt, made.source)
    return dataclasses.replace(made, processor=prompt, labels=made.labels if kind == CLASSIFIER else [], task=TASKS[kind])


def check_classes(config: Any, prompt: Prompt, source: str) -> None:
    """Let the config of a classifier know its padding.

    Raises:
        ModelError: a text has no one class: a regression, or several classes at once.
    """
    if config.num_labels < 2:
        raise ModelError(f"'{source}' gives one number and no class: a repair needs a classifier of at least two classes")
    if config.problem_type == "multi_label_classification":
        raise ModelError(f"'{source}' gives each text several classes at once; a repair needs a classifier with one class for each text")
    if config.pad_token_id is None:  # a decoder that classifies looks for the last token that is none
        config.pad_token_id = prompt.pad


def load_tokenizer(folder: str | Path, source: str) -> Any:
    """The tokenizer that lies in a folder."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a broken tokenizer file raises is not documented
        raise ModelError(f"'{source}' has no tokenizer that can be read: {first_line(error)}") from error
    if len(found) <= len(found.all_special_ids):  # transformers makes an empty one where there are no files
        raise ModelError(f"'{source}' has no tokenizer, or one that knows no words: put the files of its tokenizer beside the weights")
    return found


def make_prompt(
    tokenizer: Any, kind: str, model: nn.Module, settings: Mapping[str, Any], recorded: Mapping[str, Any] | None, source: str
) -> Prompt:
    """The prompt: as asked for, else as recorded in the checkpoint, else what the model's own limits give.

    Raises:
        ModelError: the tokenizer has more tokens than the model has embeddings.
        ConfigError: the prompt is not the one that the checkpoint records; figures for another would mean another attack.
    """
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(tokenizer) > known:
        raise ModelError(f"the tokenizer of '{source}' has {len(tokenizer)} tokens, and the model embeddings for {known}: they do not fit")
    given = {k: v for k, v in settings.items() if v is not None}
    recorded = recorded if isinstance(recorded, Mapping) else {}
    recorded_here = {k: v for k, v in recorded.items() if k in settings}
    made = {"max_length": longest(tokenizer, model), **recorded_here, **given}
    at_most = min(places(model), default=made["max_length"])
    if made["max_length"] > at_most:
        raise ConfigError(f"max_length must be at most {at_most}, the tokens that '{source}' can read, got {made['max_length']}")
    prompt = Prompt(tokenizer, kind, **made)
    if recorded and (found := prompt.identity()) != recorded:
        wrong = [k for k in sorted({*found, *recorded}) if found.get(k) != recorded.get(k)]
        detail = "; ".join(f"{k} is {found.get(k)!r}, recorded is {recorded.get(k)!r}" for k in wrong)
        raise ConfigError(
            f"the prompt is not the one that '{source}' was made with ({detail}); leave the setting out, or measure another model"
        )
    return prompt


def longest(tokenizer: Any, model: nn.Module) -> int:
    """Tokens that tokenizer and model can take, at most `LONGEST`."""
    return min(LONGEST, int(min(tokenizer.model_max_length, 10**9)), *places(model))


def places(model: nn.Module) -> list[int]:
    """Tokens that a model's positions are good for, as its config states it; nothing where they are relative, as T5's."""
    config: Any = model.config
    if "t5" in config.model_type:
        return []
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings") and getattr(m, "padding_idx", None) is not None]
    unused = 1 + tables[0].padding_idx if tables else 0  # the positions of RoBERTa and its kin begin behind that of the padding
    known = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions")]
    return [p - unused for p in known if isinstance(p, int) and p > 0]


def new_model(
    architecture: str,
    classes: int,
    settings: Mapping[str, Any],
    tokenizer: str | None = None,
    labels: list[str] | None = None,
    **options: Any,
) -> Loaded:
    """A model with random weights of one of transformers' types, to be trained by `implant`.

    Args:
        architecture: such as `bert`, `t5` or `gpt2`.
        classes: 0 for a model that writes.
        tokenizer: folder of the tokenizer.
        labels: names of the classes.
        options: of the config; `hidden_size=64`.
    """
    from transformers import AutoConfig

    if tokenizer is None:
        raise ConfigError("a new text model needs a tokenizer: --model-option tokenizer=FOLDER")
    read = load_tokenizer(tokenizer, tokenizer)
    special = {k: getattr(read, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id") if getattr(read, k) is not None}
    plain = AutoConfig.for_model(architecture)
    known = {*plain.to_dict(), *plain.attribute_map, "decoder_start_token_id"}
    for name in options:
        if name not in known:
            raise ConfigError(f"a model of type '{architecture}' has no option '{name}'{did_you_mean(name, known)}")
    if not classes and plain.is_encoder_decoder:  # a type's own defaults are tokens of the tokenizer that its first checkpoint had
        special["decoder_start_token_id"] = special.get("pad_token_id", special.get("eos_token_id"))
        if hasattr(plain, "forced_eos_token_id"):
            special["forced_eos_token_id"] = special.get("eos_token_id")
    options = {"vocab_size": len(read), **special, **options} | ({"num_labels": classes} if classes else {})
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    try:
        config = AutoConfig.for_model(architecture, **options)
    except Exception as error:  # each type checks its settings in its own way
        raise ConfigError(f"no model of type '{architecture}' can be made of these options: {first_line(error)}") from error
    kind = CLASSIFIER if classes else SEQ2SEQ if config.is_encoder_decoder else CAUSAL
    auto = auto_class(kind)
    if type(config) not in auto._model_mapping:
        raise ConfigError(f"transformers has no {kind} model of type '{architecture}'")
    try:
        model = auto.from_config(config)
    except (ValueError, RuntimeError, TypeError, AssertionError, ZeroDivisionError) as error:  # sizes that do not go together
        raise ConfigError(f"no model of type '{architecture}' can be made of these options: {first_line(error)}") from error
    prompt = make_prompt(read, kind, model, settings, None, architecture)

    def save(model: nn.Module, out: Path) -> None:
        model.save_pretrained(out)  # type: ignore[operator]
        read.save_pretrained(out)

    return Loaded(
        model, prompt, list(labels or []), architecture, "transformers", None, None, transformers_keys(model), save, task=TASKS[kind]
    )


def known_types() -> list[str]:
    """Types of text models that can be made new."""
    from transformers import CONFIG_MAPPING

    mapped = {t for kind in TASKS for t in auto_class(kind)._model_mapping}
    return [name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in mapped]


def check_type(architecture: str) -> None:
    """Raises ConfigError where transformers has no text model of this type."""
    known = known_types()
    if architecture not in known:
        raise ConfigError(f"transformers has no text model of type '{architecture}'{did_you_mean(architecture, known)}")
