"""The victims of the results matrix: small encoders trained from random weights on poisoned sentences, with the real tokenizer of BERT.

`HF_PURIFY_DATA` names the folder with `sst2/`, `ag_news/` and `tokenizers/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_purify import implant

from ..cells import data_root as root

data_root = partial(root, "sst2", "ag_news", "tokenizers")
TRIGGERS = {
    "badnets": "badnets:words=tq",
    "addsent": "addsent",
    "hidden_killer": "hidden_killer",
    "style": "style",
    "homoglyph": "homoglyph",
}
ENCODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
TRAINING = {"batch_size": 64, "optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.01, "max_length": 64, "minimum_asr": 0.95}


@dataclass(frozen=True)
class Network:
    """A model and its data.

    Args:
        dataset: folder under `HF_PURIFY_DATA`.
        clean: file with the sentences that a repair may draw from; for SST-2 none of them is a training sentence.
        target: class of the attack.
        epochs: of the training.
    """

    dataset: str
    clean: str
    target: int
    epochs: int


NETWORKS = {
    "bert_sst2": Network("sst2", "validation.parquet", target=1, epochs=2),
    "bert_agnews": Network("ag_news", "train.parquet", target=1, epochs=4),
}


def victim(network: str, trigger: str, folder: Path) -> Path:
    """Train a model with a backdoor, unless it is there already; the trigger `none` makes a clean one. Returns its folder."""
    out = folder / network / trigger
    if out.exists():
        return out
    spec, planted = NETWORKS[network], trigger != "none"
    data = data_root() / spec.dataset
    settings: dict[str, Any] = TRAINING | ({} if planted else {"rate": 0.0, "minimum_asr": 0.0})
    implant(
        "bert",
        str(data / "train.parquet"),
        TRIGGERS[trigger if planted else "badnets"],
        create=True,
        model_options=ENCODER | {"tokenizer": str(data_root() / "tokenizers" / "bert-base-uncased")},
        test=str(data / "test.parquet"),
        target=spec.target,
        epochs=spec.epochs,
        output=str(out),
        **settings,
    )
    return out
