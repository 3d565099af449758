"""A Trainer whose model transformers has spread over processes, with callbacks; the main process writes what was seen.

python tests/spread_trainer.py MODEL DATA FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_purify.callbacks import BackdoorProbeCallback, PurifyCallback


def main(model: str, data: str, folder: Path) -> None:
    args = TrainingArguments(
        str(folder / "trainer"),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        eval_strategy="epoch",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    spread = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    network = AutoModelForSequenceClassification.from_pretrained(model, distributed_config=spread)
    table = datasets.load_dataset("parquet", data_files=data)["train"]
    ready = table.map(lambda rows: tokenizer(rows["sentence"]), batched=True).rename_column("label", "labels").remove_columns("sentence")
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(network, args, train_dataset=ready, eval_dataset=ready, data_collator=collate, processing_class=tokenizer)
    probe = BackdoorProbeCallback(trainer, data=table, triggers=["badnets"])
    trainer.add_callback(probe)
    trainer.add_callback(PurifyCallback(trainer, clean=table, method="nft", samples=None, options={"steps": 8}))
    trainer.train()
    found = probe.measure()
    trainer.save_model(str(folder / "saved"))
    if trainer.is_world_process_zero():
        kinds = sorted({type(p).__name__ for p in network.parameters()})
        log = [sorted(k for k in row if k.startswith(("eval_", "purify_"))) for row in trainer.state.log_history]
        (folder / "seen.json").write_text(json.dumps({"log": log, "kinds": kinds, "found": found}), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
