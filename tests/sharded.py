"""Repairs of a checkpoint that is spread over processes (FSDP2), or whole on one.

python tests/sharded.py FOLDER OUT MODEL/METHOD ...

FOLDER holds models, and data for each as MODEL.parquet.

A method with `!` behind it is interrupted behind its first checkpoint, and goes on; one with `~` computes in bfloat16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState

from hf_purify.purifier import run_purify
from hf_purify.recipe import PurifyRecipe
from hf_purify.resuming import Progress

OPTIONS = {
    "nft": {"steps": 6},
    "rnp": {"unlearn_steps": 6, "recover_epochs": 2},
    "ft_sam": {"epochs": 2},
    "fine_tune": {"epochs": 2},
    "neural_cleanse": {"find_steps": 2, "invert_steps": 4, "steps": 4, "cut": 1.0},
}


def main(folder: Path, out: Path, jobs: list[str]) -> None:
    for job in jobs:
        model, _, spec = job.partition("/")
        method, data = spec.rstrip("!~"), str(folder / f"{model}.parquet")
        settings = {"options": OPTIONS.get(method, {}), "samples": None, "held_out": 0.5, "controls": False, "test": data}
        recipe = PurifyRecipe.make(model=str(folder / model), clean=data, method=method, output=str(out / job), device="cpu", **settings)
        if spec.endswith("~"):
            recipe = dataclasses.replace(recipe, precision="bf16")
        if spec.endswith("!"):
            recipe = dataclasses.replace(recipe, checkpoint_every=2)
            interrupt(recipe)
        report = run_purify(recipe)
        if os.environ.get("RANK", "0") == "0":
            kinds = sorted({type(p).__name__ for p in report.model.parameters()})
            mine = sum(getattr(p, "_local_tensor", p).numel() for p in report.model.parameters())
            (out / f"{job}.json").write_text(json.dumps({"kinds": kinds, "values here": mine}), "utf-8")


def interrupt(recipe: PurifyRecipe) -> None:
    write = Progress.write

    def once(self: Progress, state: Any, entry: dict[str, Any]) -> None:
        write(self, state, entry)
        raise KeyboardInterrupt

    Progress.write = once  # type: ignore[method-assign]
    try:
        run_purify(recipe)
    except KeyboardInterrupt:
        PartialState().wait_for_everyone()
    finally:
        Progress.write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
