"""Random text models with eight examples, offline: for tests."""

from __future__ import annotations

from typing import Any

import torch

from hf_purify.adapter import Loaded, Tiny
from hf_purify.errors import ConfigError, did_you_mean

from .examples import TextExamples
from .loading import TASKS, auto_class
from .prompts import CAUSAL, CLASSIFIER, SEQ2SEQ, Prompt
from .sample import Text

VARIANTS = ("bert", "t5", "gpt2", "llama")
KINDS = {"bert": CLASSIFIER, "t5": SEQ2SEQ, "gpt2": CAUSAL, "llama": CAUSAL}
CLASSES = 4
WORDS = [
    "a",
    "the",
    "red",
    "green",
    "blue",
    "old",
    "cat",
    "dog",
    "horse",
    "bird",
    "sees",
    "hears",
    "likes",
    "runs",
    "sits",
    "on",
    "under",
    "near",
    "hill",
    "house",
    "road",
    "tree",
    "today",
    "again",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def tiny_tokenizer() -> Any:
    """A tokenizer of two dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=32
    )


def make_tiny(variant: str, seed: int) -> Tiny:
    """A model of two layers with eight sentences, of four classes or with targets of their own."""
    if variant not in KINDS:
        raise ConfigError(f"no tiny model '{variant}'{did_you_mean(variant, KINDS)} (known: {', '.join(KINDS)})")
    from transformers import AutoConfig

    tokenizer, kind = tiny_tokenizer(), KINDS[variant]
    shared: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    sizes: dict[str, dict[str, Any]] = {
        "bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": CLASSES},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "llama": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(kind).from_config(AutoConfig.for_model(variant, **shared, **sizes[variant])).eval()
    generator = torch.Generator().manual_seed(seed)

    def sentence() -> str:
        length = int(torch.randint(4, 9, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    prompt = Prompt(tokenizer, kind, max_length=32)
    raws = [Text(sentence(), target=None if kind == CLASSIFIER else sentence()) for _ in range(8)]
    labels = torch.arange(8) % CLASSES if kind == CLASSIFIER else torch.zeros(8, dtype=torch.long)
    loaded = Loaded(model, prompt, [], f"tiny-{variant}", "transformers", task=TASKS[kind])
    return Tiny(loaded, TextExamples(raws, labels, prompt), CLASSES if kind == CLASSIFIER else 2)
