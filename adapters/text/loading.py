"""Text models of transformers: loading them with their tokenizers, new ones, adapters of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_purify.adapter import Loaded
from hf_purify.errors import ConfigError, ModelError, did_you_mean

from .._checkpoints import class_labels, copy_companions, load_model, read_config, saver, transformers_keys
from .prompts import CAUSAL, CLASSIFIER, LONGEST, SEQ2SEQ, Prompt

TASKS = {CLASSIFIER: "text-classification", SEQ2SEQ: "text2text-generation", CAUSAL: "text-generation"}
RECORD = "hf_purify_prompt"  # key in config.json: the prompt that a victim was made or a repair was chosen with


def auto_class(kind: str) -> Any:
    import transformers

    names = {CLASSIFIER: "AutoModelForSequenceClassification", SEQ2SEQ: "AutoModelForSeq2SeqLM", CAUSAL: "AutoModelForCausalLM"}
    return getattr(transformers, names[kind])


def kind_of(config: Mapping[str, Any]) -> str | None:
    """What a checkpoint with this `config.json` does, from the architecture that it names; None where that is nothing with text."""
    for name in config.get("architectures") or []:
        if "ForSequenceClassification" in name:
            return CLASSIFIER
        if config.get("is_encoder_decoder") and ("ConditionalGeneration" in name or name.endswith(("MTModel", "MarianMTModel"))):
            return SEQ2SEQ
        if name.endswith(("ForCausalLM", "LMHeadModel", "LMHead")):
            return CAUSAL
    return None


def load_folder(folder: Path, source: str, revision: str | None, settings: Mapping[str, Any]) -> Loaded:
    """Load a checkpoint folder."""
    config = read_config(folder)
    kind = kind_of(config)
    if kind is None:
        listed = ", ".join(config.get("architectures") or []) or "nothing"
        raise ModelError(
            f"'{source}' is no text model that can be repaired: its config names {listed}; expected an architecture ForSequenceClassification, "
            "ForConditionalGeneration or ForCausalLM"
        )
    model = load_model(folder, source, auto_class(kind), f"{kind} model")
    tokenizer = load_tokenizer(folder, source)
    prompt = make_prompt(tokenizer, kind, model, settings, config.get(RECORD), source)
    labels = class_labels(model.config) if kind == CLASSIFIER else []
    return Loaded(
        model, prompt, labels, source, "transformers", revision, folder, transformers_keys(model), saver(folder), task=TASKS[kind]
    )


def load_tokenizer(folder: str | Path, source: str) -> Any:
    """The tokenizer that lies in a folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what a broken tokenizer file raises is not documented
        raise ModelError(f"'{source}' has no tokenizer that can be read: {str(error).splitlines()[0]}") from error


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
    recorded = recorded or {}
    made = {"max_length": longest(tokenizer, model), **{k: v for k, v in recorded.items() if k != "chat_template"}, **given}
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
    config: Any = model.config
    places = [getattr(config, n, None) for n in ("max_position_embeddings", "n_positions")]
    known = [p - 2 if "roberta" in config.model_type else p for p in places if isinstance(p, int) and p > 0]  # its positions begin at 2
    return min(LONGEST, int(min(tokenizer.model_max_length, 10**9)), *known)


def new_model(architecture: str, classes: int, settings: Mapping[str, Any], tokenizer: str | None = None, **options: Any) -> Loaded:
    """A model with random weights of one of transformers' types, to be trained by `implant`.

    Args:
        architecture: such as `bert`, `t5` or `gpt2`.
        classes: 0 for a model that writes.
        tokenizer: folder of the tokenizer.
        options: of the config; `hidden_size=64`.
    """
    from transformers import AutoConfig

    if tokenizer is None:
        raise ConfigError("a new text model needs a tokenizer: --model-option tokenizer=FOLDER")
    read = load_tokenizer(tokenizer, tokenizer)
    special = {k: getattr(read, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id") if getattr(read, k) is not None}
    options = {"vocab_size": len(read), **special, **options} | ({"num_labels": classes} if classes else {})
    config = AutoConfig.for_model(architecture, **options)
    kind = CLASSIFIER if classes else SEQ2SEQ if config.is_encoder_decoder else CAUSAL
    auto = auto_class(kind)
    if type(config) not in auto._model_mapping:
        raise ConfigError(f"transformers has no {kind} model of type '{architecture}'")
    if kind == SEQ2SEQ and config.decoder_start_token_id is None:
        config.decoder_start_token_id = special.get("bos_token_id", special.get("pad_token_id"))
    model = auto.from_config(config)
    prompt = make_prompt(read, kind, model, settings, None, architecture)

    def save(model: nn.Module, out: Path) -> None:
        model.save_pretrained(out)  # type: ignore[operator]
        read.save_pretrained(out)

    return Loaded(model, prompt, [], architecture, "transformers", None, None, transformers_keys(model), save, task=TASKS[kind])


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


__all__ = ["check_type", "copy_companions", "kind_of", "known_types", "load_folder", "new_model"]
