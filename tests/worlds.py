"""Repairs of tiny models on however many processes this is launched on; the main one writes what came of them.

python tests/worlds.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from shrunk import small
from torch import nn

from hf_purify.method import Context
from hf_purify.registry import find, names

# Every method on a network with batch norms; then every way in which a batch is shared out: texts that are mixed behind the model, boxes, clips, clouds.
CASES = [(method, "vision", "resnet") for method in names("method")] + [
    ("ft_sam", "vision", "vit"),
    ("nft", "text", "bert"),
    ("nft", "text", "llama"),
    ("ft_sam", "text", "gpt2"),
    ("neural_cleanse", "text", "llama"),
    ("nft", "detection", "detr"),
    ("nft", "video", "conv3d"),
    ("fine_tune", "pointcloud", "pointnet"),
]


def context(adapter: str, variant: str, accelerator: Accelerator, dropout: bool = False) -> Context:
    """A tiny model, without dropout if not asked for, which draws other numbers on each process."""
    modality = find("adapter", adapter)()
    tiny = modality.tiny(variant)
    for module in () if dropout else tiny.loaded.model.modules():
        for name in [
            n for n, value in vars(module).items() if isinstance(value, float) and ("dropout" in n or isinstance(module, nn.Dropout))
        ]:
            setattr(module, name, 0.0)
    index = modality.index(tiny.loaded, tiny.data.batch(torch.arange(2)))
    generator = torch.Generator().manual_seed(0)
    held_out = tiny.data.select(torch.arange(5))
    return Context(tiny.loaded.model, modality, tiny.data, generator, accelerator, "none", index, held_out, modality.outcomes(tiny.loaded))


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    folder.mkdir(exist_ok=True)
    for method, adapter, variant in CASES:
        ctx = context(adapter, variant, accelerator)
        torch.manual_seed(0)
        verdict = small(method, batch_size=5)(ctx)  # eight samples: the last batch of an epoch has three
        if accelerator.is_main_process:
            found = {f"weights/{n}": v.contiguous().clone() for n, v in ctx.model.state_dict().items()}
            save_file(found | {"mask": verdict.mask, "scores": verdict.scores}, folder / f"{method}-{adapter}-{variant}.safetensors")
            chosen = {k: v for k, v in verdict.notes.items() if not isinstance(v, float)}
            (folder / f"{method}-{adapter}-{variant}.json").write_text(json.dumps(chosen, default=str), "utf-8")
    if accelerator.is_main_process:
        (folder / "processes").write_text(str(accelerator.num_processes), "utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
