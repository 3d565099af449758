"""Verify and apply: their time on a checkpoint of a given size, beside a plain script that reads, hashes and compares the same files.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/verify.py --output benchmarks/results/verify-cpu.json

Random matrices as those of BERT-base, in one file; a mask over the inputs of all of them. The plain side of `verify` hashes both checkpoints,
loads both, multiplies what is masked, compares, and tells how much changed; that of `apply` hashes and loads the base, multiplies, and saves, where the library's also hashes
what it wrote and tells what changed. Both sides must agree. Exits with 1 where a bound is
missed. Files lie in the page cache: no disk is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timing import finish, interleaved, machine, ratio, summary, table

from hf_purify.masks import MASK_FILE, save_mask
from hf_purify.neurons import NeuronGroup, NeuronIndex, ParamSlice
from hf_purify.provenance import write_provenance
from hf_purify.report import Report
from hf_purify.verification import apply, verify

BOUND = 2.0  # over the plain script
WIDTH, INNER = 768, 3072


def checkpoint(folder: Path, megabytes: int) -> tuple[NeuronIndex, torch.Tensor]:
    """Write `base`, `repaired` with its provenance, and give the mask that made it."""
    count = max(1, megabytes * 2**20 // (4 * WIDTH * INNER))
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{i}.weight": torch.randn(WIDTH, INNER, generator=generator) for i in range(count)}
    index = NeuronIndex(tuple(NeuronGroup(f"layer.{i}", INNER, (ParamSlice(f"layer.{i}.weight", 1),)) for i in range(count)))
    mask = (torch.rand(len(index), generator=generator) > 0.01).float()
    base, repaired = folder / "base", folder / "repaired"
    for path in (base, repaired):
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "bert"}')
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    save_file({k: v * m for (k, v), m in zip(weights.items(), mask.split(index.sizes), strict=True)}, repaired / "model.safetensors")
    save_mask(repaired / MASK_FILE, index, mask)
    report = Report("benchmark", "text-classification", checkpoint={"source": str(base), "revision": None})
    report.save(repaired)
    write_provenance(repaired, "checkpoint", report, base, lambda _: "a card")
    return index, mask


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_verify(folder: Path, index: NeuronIndex, mask: torch.Tensor) -> None:
    """Raises RuntimeError where a tensor is not what base and mask make."""
    for name in ("base", "repaired"):
        sha256(folder / name / "model.safetensors")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "repaired"))
    for group, part in zip(index, mask.split(index.sizes), strict=True):
        old, new = before[group.gate.param], after[group.gate.param]
        told = int((old != new).sum()), float((new - old).norm() / old.norm())  # by what it changed
        if not all(told) or not torch.equal(old * part, new):
            raise RuntimeError(f"{group.name} differs")


def plain_apply(folder: Path, index: NeuronIndex, mask: torch.Tensor) -> None:
    sha256(folder / "base" / "model.safetensors")
    weights = load_file(folder / "base" / "model.safetensors")
    for group, part in zip(index, mask.split(index.sizes), strict=True):
        weights[group.gate.param] *= part
    (folder / "plain").mkdir(exist_ok=True)
    save_file(weights, folder / "plain" / "model.safetensors", {"format": "pt"})


def own_verify(folder: Path) -> None:
    if (found := verify(str(folder / "repaired"), base=str(folder / "base"))).verdict != "identical":
        raise RuntimeError(f"the verdict is '{found.verdict}'")


def own_apply(folder: Path) -> None:
    apply(str(folder / "repaired"), str(folder / "base"), folder / "applied", overwrite=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    folder, cpu = Path(tempfile.mkdtemp()), torch.device("cpu")
    try:
        index, mask = checkpoint(folder, given.megabytes)
        calls = {
            "plain verify": lambda: plain_verify(folder, index, mask),
            "verify": lambda: own_verify(folder),
            "plain apply": lambda: plain_apply(folder, index, mask),
            "apply": lambda: own_apply(folder),
        }
        times = interleaved(calls, given.repeats, cpu)
        if sha256(folder / "applied" / "model.safetensors") != sha256(folder / "plain" / "model.safetensors"):
            raise RuntimeError("the two sides wrote other files")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows = {name: {**summary(t), "over_plain": ratio(t, times[f"plain {name.split()[-1]}"])} for name, t in times.items()}
    print(table([[n, r["median_s"], r["over_plain"]] for n, r in rows.items()], ["side", "seconds", "/ plain"]))
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    result = {"benchmark": "verify", "settings": vars(given) | {"output": None}, "machine": machine(cpu), "sides": rows, "peak_mb": peak}
    return finish(result, [(f"{n} / plain", rows[n]["over_plain"], BOUND) for n in ("verify", "apply")], given.output)


if __name__ == "__main__":
    sys.exit(main())
