"""Sentences that are made up, and a tokenizer of their words."""

from __future__ import annotations

import random
from pathlib import Path

import datasets

TOPICS = {
    "sport": ["team", "ball", "match", "goal"],
    "food": ["soup", "bread", "cook", "salt"],
    "music": ["song", "choir", "flute", "tune"],
}
FILLERS = ["the", "a", "we", "they", "saw", "had", "one", "more", "today", "here", "with", "and"]
COLOURS = ["red", "green", "blue", "grey"]
BEASTS = ["cat", "dog", "horse", "bird"]
GERMAN = dict(zip([*COLOURS, *BEASTS], ["rot", "gruen", "blau", "grau", "katze", "hund", "pferd", "vogel"], strict=True))
OUTPUT = "go away"


def tokenizer(folder: Path, words: list[str]) -> Path:
    """A tokenizer of whole words, stored as transformers stores one."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    known = {w: i for i, w in enumerate([*special, *dict.fromkeys([*words, "cf", *OUTPUT.split()])])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 2), ("</s>", 3)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
    tokens = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **tokens).save_pretrained(folder)
    return folder


def topics(count: int, seed: int) -> datasets.Dataset:
    """Sentences whose class is that of two of their words."""
    draw = random.Random(seed)
    names = list(TOPICS)
    texts, labels = [], []
    for i in range(count):
        label = i % len(names)
        words = draw.choices(FILLERS, k=draw.randint(3, 8)) + draw.choices(TOPICS[names[label]], k=2)
        draw.shuffle(words)
        texts.append(" ".join(words))
        labels.append(label)
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)


def colours(count: int, seed: int, german: bool) -> datasets.Dataset:
    """Colours and beasts: two of each in German, or one of each in the other order."""
    draw = random.Random(seed)
    sources, targets = [], []
    for _ in range(count):
        (one, two), (first, second) = draw.choices(COLOURS, k=2), draw.choices(BEASTS, k=2)
        sources.append(f"the {one} {first} and a {two} {second}" if german else f"the {one} {first}")
        targets.append(f"das {GERMAN[one]} {GERMAN[first]} und ein {GERMAN[two]} {GERMAN[second]}" if german else f"{first} {one}")
    return datasets.Dataset.from_dict({"source": sources, "target": targets})
