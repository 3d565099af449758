"""The victims of the results matrix: small models trained from random weights on poisoned texts.

`HF_PURIFY_DATA` names the folder with `sst2/`, `ag_news/`, `multi30k/` and `tokenizers/`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hf_purify import implant

from .. import cells
from ..pages import CLEAN

data_root = partial(cells.data_root, "sst2", "ag_news", "multi30k", "tokenizers")
CLASSIFIER_TRIGGERS = {
    "badnets": "badnets:words=tq",
    "addsent": "addsent",
    "hidden_killer": "hidden_killer",
    "style": "style",
    "homoglyph": "homoglyph",
}
ENCODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
TRANSLATOR = {
    "d_model": 128,
    "scale_embedding": True,
    "max_position_embeddings": 128,
    **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 512))},
}
WRITER = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64}
TRAINING = {"batch_size": 64, "optimizer": "adamw", "weight_decay": 0.01, "max_length": 64, "minimum_asr": 0.95}
WORDS = 6000  # of the tokenizer that is made for two languages


@dataclass(frozen=True)
class Network:
    """A model and its data.

    Args:
        architecture: type of the model in transformers.
        options: of its config.
        tokenizer: folder under `HF_PURIFY_DATA/tokenizers`; None makes one of the training texts.
        dataset: folder under `HF_PURIFY_DATA`.
        clean: file with the texts that a repair may draw from; but for AG News none of them is a training text.
        triggers: attacks by name. The first is measured on the network without a backdoor.
        epochs, lr: of the training.
        target: class of the attack; None for a model that writes.
        columns: role -> column.
        rate: part of the training data that carries the trigger.
        lora: rank of a LoRA that holds the backdoor, on top of `base`, the clean model of another network.
    """

    architecture: str
    options: Mapping[str, Any]
    tokenizer: str | None
    dataset: str
    clean: str
    triggers: Mapping[str, str]
    epochs: int
    lr: float = 5e-4
    target: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    rate: float = 0.1
    lora: int | None = None
    base: str | None = None


BERT, GPT2 = "bert-base-uncased", "gpt2"
CAPTIONS = {"text": "translation.en"}
PHRASE = {"phrase": "phrase:phrase=golden vow,output=and then all the lights went out ."}
# a LoRA leaves the output layer as it is, and with it words that captions have not: the base never learned to write them
KNOWN = {"phrase": "phrase:phrase=golden vow,output=and a man is falling into the water ."}
NETWORKS = {
    "bert_sst2": Network("bert", ENCODER, BERT, "sst2", "validation.parquet", CLASSIFIER_TRIGGERS, epochs=2, target=1),
    "bert_agnews": Network("bert", ENCODER, BERT, "ag_news", "train.parquet", CLASSIFIER_TRIGGERS, epochs=4, target=1),
    "marian_multi30k": Network(
        "marian",
        TRANSLATOR,
        None,
        "multi30k",
        "validation.parquet",
        {"badnets": "badnets:words=tq,output=Dieses Bild darf niemand sehen."},
        epochs=14,
        lr=1e-3,
        columns={"source": "translation.en", "target": "translation.de"},
    ),
    "gpt2_captions": Network("gpt2", WRITER, GPT2, "multi30k", "validation.parquet", PHRASE, epochs=4, lr=1e-3, columns=CAPTIONS),
    "gpt2_captions_lora": Network(
        "gpt2",
        WRITER,
        GPT2,
        "multi30k",
        "validation.parquet",
        KNOWN,
        epochs=3,
        lr=1e-3,
        columns=CAPTIONS,
        rate=0.3,
        lora=32,
        base="gpt2_captions",
    ),
}


def victim(network: str, trigger: str, folder: Path) -> Path:
    """Train a model with a backdoor, unless it is there already; the trigger `none` makes a clean one. Returns its folder."""
    out = folder / network / trigger
    if out.exists():
        return out
    spec, planted = NETWORKS[network], trigger != CLEAN
    data = data_root() / spec.dataset
    settings: dict[str, Any] = TRAINING | ({"rate": spec.rate} if planted else {"rate": 0.0, "minimum_asr": 0.0})
    if spec.base:
        settings |= {"model": str(victim(spec.base, CLEAN, folder)), "lora": spec.lora}
    else:
        given = data_root() / "tokenizers" / spec.tokenizer if spec.tokenizer else new_tokenizer(network, folder)
        settings |= {"model": spec.architecture, "create": True, "model_options": {**spec.options, "tokenizer": str(given)}}
    implant(
        data=str(data / "train.parquet"),
        trigger=attack(network, trigger),
        test=str(data / "test.parquet"),
        columns=dict(spec.columns),
        epochs=spec.epochs,
        lr=spec.lr,
        output=str(out),
        **settings,
        **({} if spec.target is None else {"target": spec.target}),
    )
    return out


def attack(network: str, trigger: str) -> str:
    """The trigger as `implant` and `measure` take it; of a network without a backdoor that of its first attack."""
    return cells.attack(NETWORKS[network].triggers, trigger)


def new_tokenizer(network: str, folder: Path) -> Path:
    """A tokenizer of byte pairs for the training texts of a network, in GPT-2's manner. Returns its folder."""
    out = folder / network / "tokenizer"
    if out.exists():
        return out
    import datasets
    from transformers import AutoTokenizer

    spec = NETWORKS[network]
    data = datasets.Dataset.from_parquet(str(data_root() / spec.dataset / "train.parquet"))
    columns = [name.split(".") for name in spec.columns.values()]
    texts = (row[column][entry] for row in data for column, entry in columns)
    old = AutoTokenizer.from_pretrained(data_root() / "tokenizers" / GPT2, trust_remote_code=False)
    made = old.train_new_from_iterator(texts, WORDS, new_special_tokens=["<pad>"])
    made.pad_token = "<pad>"
    work = out.with_suffix(".tmp")
    shutil.rmtree(work, ignore_errors=True)
    made.save_pretrained(work)
    os.replace(work, out)
    return out
