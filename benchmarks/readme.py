"""Write the tables of benchmarks/README.md, docs/scale.md and the README from the JSON in benchmarks/results, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TITLES = {
    "estimate-cpu": "what an estimate predicts over what a small Llama takes",
    "masks-cpu": "one thread of a CPU",
    "processes-cpu": "one, two and four processes on two cores",
    "runs-compile-cpu": "the options, torch.compile among them",
    "runs-cpu": "stem of CIFAR",
    "runs-small-cpu": "stem of ImageNet on 32 px (steps 15 times cheaper)",
    "scan-cpu": "a scan beside a repair by RNP (plain), ResNet-18, 500 images",
    "text-cpu": "language models on one thread of a CPU",
    "verify-cpu": "published repairs checked and laid on their base, 400 MB",
}


def rows(head: list[str], body: list[list[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in body])


def facts(result: dict[str, Any]) -> str:
    """The machine, in one line."""
    m = result["machine"]
    named = m.get("gpu") or f"{m['processors']} processors ({m['processor']}, {m['instructions']})"
    return f"{named}, {m['threads']} thread(s), torch {m['torch']}, clock `{m['clock']}`."


def bounds(result: dict[str, Any]) -> str:
    """The bounds and whether they are met."""
    return rows(
        ["bound", "measured", "at most", "met"],
        [[b["what"], b["value"], b["bound"], "yes" if b["met"] else "**no**"] for b in result["bounds"]],
    )


def masks(result: dict[str, Any]) -> list[str]:
    """Tables of masks.py."""
    out = [f"A large matrix product reaches {result['matrix_product_gflop_per_s']} GFLOP/s in the same process. {facts(result)}"]
    head = ["mechanism", "s", "/ lower bound", "/ fine-tuning", "GFLOP", "GFLOP/s", "peak MiB", "kept for backward MiB"]
    keys = ["median_s", "over_lower_bound", "over_fine_tuning", "gflop", "gflop_per_s", "peak_mb", "saved_mb"]
    for name, shape in result["shapes"].items():
        out.append(f"**{name}**, batch {shape['batch']}, {shape['size']} px, {shape['neurons']} neurons in {shape['groups']} groups")
        out.append(rows(head, [[n, *(r[k] for k in keys)] for n, r in shape["mechanisms"].items()]))
    out.append("**Benign salience**, against one forward and backward pass with all weight gradients")
    body = [[n, k, r["neurons"], r["over_plain"]] for n, s in result["salience"].items() for k, r in s["selections"].items()]
    return [*out, rows(["network", "salience of", "neurons", "/ plain pass"], body), bounds(result)]


def runs(result: dict[str, Any]) -> list[str]:
    """Tables of runs.py."""
    s = result["settings"]
    what = (
        [f"{s['steps']} NFT steps"] * ("nft" in s["only"]) + [f"{s['epochs']} RNP epochs"] * ("rnp" in s["only"]) + [f"batch {s['batch']}"]
    )
    out = [f"{', '.join(what)}, {s['images']} images, {s['repeats']} rounds. {facts(result)}"]
    body = [
        [n.upper(), r["hf-purify"]["median_s"], r["plain"]["median_s"], r["over_plain"], f"{r['mask_difference']:.1g}"]
        for n, r in result["runs"].items()
    ]
    if body:
        out += [rows(["run", "hf-purify s", "plain loop s", "/ plain", "masks differ by"], body), bounds(result)]
    if kinds := result.get("options", {}).get("kinds"):
        body = [[n, r["median_s"], r["over_fp32"], r["first_run_s"]] for n, r in kinds.items()]
        out.append(rows([f"NFT, {result['options']['steps']} steps", "s", "/ fp32", "first run s"], body))
    return out


def texts(result: dict[str, Any]) -> list[str]:
    """Tables of text.py."""
    out = [f"A large matrix product reaches {result['matrix_product_gflop_per_s']} GFLOP/s in the same process. {facts(result)}"]
    columns = {
        "s": "median_s",
        "tokens/s": "tokens_per_s",
        "/ lower bound": "over_lower_bound",
        "/ fine-tuning": "over_fine_tuning",
        "/ LoRA": "over_lora",
        "GFLOP": "gflop",
        "peak MiB": "peak_mb",
        "kept for backward MiB": "saved_mb",
        "values learned": "learned",
    }
    for name, text in result["texts"].items():
        what = f"{text['parameters'] / 1e6:.1f} million parameters, {text['neurons']} neurons in {text['groups']} groups"
        out.append(f"**{name}**, {text['batch']} x {text['tokens']} tokens, {what}")
        out.append(rows(["mechanism", *columns], [[n, *(r[k] for k in columns.values())] for n, r in text["mechanisms"].items()]))
    if large := result.get("large"):
        out.append(
            f"**One mask step of {large['parameters'] / 1e9:.2f} billion parameters** in bf16 ({large['network']}; "
            f"{large['batch']} x {large['tokens']} tokens; {large['mask_values']} mask values)"
        )
        ours = ["mask step, measured: the whole process, building and discovery included", large["bytes_per_parameter"], large["peak_gib"]]
        rest = [[f"fine-tuning with AdamW, computed: {n}", r["bytes_per_parameter"], r["gib"]] for n, r in large["fine_tuning"].items()]
        alone = ["of that, the weights", round(large["weights_gib"] * 2**30 / large["parameters"], 3), large["weights_gib"]]
        out.append(rows(["what", "bytes a parameter", "GiB"], [ours, alone, *rest]))
    return [*out, bounds(result)]


def processes(result: dict[str, Any]) -> list[str]:
    """Tables of processes.py."""
    s, found = result["settings"], result["processes"]
    out = [f"Batches of {s['batch']} in all, {s['steps']} steps, {s['repeats']} rounds. {facts(result)}"]
    sides = list(next(iter(found.values()))["sides"])
    head = ["side", *(f"{n}: samples/s, / plain" for n in found)]
    body = [[side, *(f"{r['sides'][side]['samples_per_s']}, {r['sides'][side]['over_plain']}" for r in found.values())] for side in sides]
    return [*out, rows(head, [*body, ["peak MiB of a process", *(r["peak_mb"] for r in found.values())]]), bounds(result)]


def estimates(result: dict[str, Any]) -> list[str]:
    """Tables of estimate.py: what was measured."""
    return [facts(result), measured(result), shared(result), bounds(result)]


def sides(result: dict[str, Any]) -> list[str]:
    """Tables of verify.py."""
    body: list[list[object]] = [[name, row["median_s"], row["over_plain"]] for name, row in result["sides"].items()]
    return [facts(result), rows(["side", "s", "/ plain"], body), bounds(result)]


def measured(result: dict[str, Any]) -> str:
    """Predicted over measured on the small Llama."""
    parts = list(result["measured"][0]["ratios"])
    body = [[r["method"], r["stored"], r["precision"], _yes(r), *(f"{v:.3f}" for v in r["ratios"].values())] for r in result["measured"]]
    return rows(["method", "weights stored in", "precision", "layers run again", *parts], body)


def shared(result: dict[str, Any]) -> str:
    """Predicted over measured on two processes that share it."""
    parts = list(result["sharded"][0]["ratios"])
    return rows(["method, FSDP2", *parts], [[r["method"], *(f"{v:.3f}" for v in r["ratios"].values())] for r in result["sharded"]])


def predicted(result: dict[str, Any]) -> str:
    """All that is predicted of the large Llamas, GiB a process."""
    parts = ["weights", "gathered", "gradients", "optimizer", "kept", "passing", "total"]
    body = [
        [name, r["method"], r["processes"], _yes(r), *(_gib(r, p) for p in parts), f"{r['flops'] / 1e15:.3g}"]
        for name, found in result["predicted"].items()
        for r in found
    ]
    return rows(["model", "method", "processes", "layers run again", *parts, "PFLOP a step"], body)


def scale(result: dict[str, Any]) -> str:
    """The README's short table: totals with layers run again."""
    body: list[list[object]] = []
    for name, found in result["predicted"].items():
        again = [r for r in found if r["checkpointing"]]
        totals = [_gib(r, "total") for method in ("nft", "fine_tune") for r in again if r["method"] == method and r["processes"] in (1, 8)]
        whole = {r["method"]: r for r in again if r["processes"] == 1}
        steps = [f"{whole[method]['flops'] / 1e15:.3g}" for method in ("nft", "fine_tune")]
        body.append([name, f"{whole['nft']['neurons']:,}", *totals, *steps])
    columns = [f"{m}, {p} process{'es' if p > 1 else ''}: GiB each" for m in ("`nft`", "`fine_tune`") for p in (1, 8)]
    return rows(["model", "values of the mask", *columns, "`nft`: PFLOP a step", "`fine_tune`"], body)


def _yes(row: dict[str, Any]) -> str:
    return "yes" if row.get("layers run again", row.get("checkpointing")) else "no"


def _gib(row: dict[str, Any], part: str) -> str:
    return f"{row['memory'][part] / 2**30:.1f}"


def fill(path: Path, mark: str, text: str) -> None:
    """Put a text between the markers of a document."""
    pattern = f"<!-- {mark} -->\n.*?<!-- /{mark} -->"
    path.write_text(re.sub(pattern, lambda _: f"<!-- {mark} -->\n{text}\n<!-- /{mark} -->", path.read_text("utf-8"), flags=re.S), "utf-8")


def main() -> None:
    parts = []
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        kind = (
            masks
            if "shapes" in result
            else texts
            if "texts" in result
            else processes
            if "processes" in result
            else estimates
            if "predicted" in result
            else sides
            if "sides" in result
            else runs
        )
        parts += [f"### {path.stem}: {TITLES.get(path.stem, result['machine'].get('gpu', 'CPU'))}", *kind(result)]
    readme = HERE / "README.md"
    begin, end = "<!-- tables -->", "<!-- end of tables -->"
    tables = f"{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}"
    text = re.sub(f"{begin}.*{end}", lambda _: tables, readme.read_text("utf-8"), flags=re.S)
    readme.write_text(text, encoding="utf-8")
    result, root = json.loads((HERE / "results" / "estimate-cpu.json").read_text("utf-8")), HERE.parent
    fill(root / "docs" / "scale.md", "measured", measured(result))
    fill(root / "docs" / "scale.md", "sharded", shared(result))
    fill(root / "docs" / "scale.md", "predicted", predicted(result))
    fill(root / "README.md", "scale", scale(result))


if __name__ == "__main__":
    main()
