"""Check a repaired checkpoint that somebody published: what was changed, and whether it is what its provenance says.

verify(model):
    result, base <- pull(model), pull(provenance.base)     # the base at the commit that the provenance names
    hashes       <- of all files, held against the provenance's
    changed      <- tensors of base and result, compared bit for bit
    folded       <- base * mask, compared with the result: *identical*, or the tensors that differ
    figures      <- measured again, where test data are given
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_purify.cards import make_card
from hf_purify.companions import changes, oddities
from hf_purify.errors import ConfigError, IndexMismatch, ModelError
from hf_purify.folding import fold_files, folded, read_fold
from hf_purify.hub import Pulled, pull, read_metadata, split_name
from hf_purify.masks import MASK_FILE
from hf_purify.output import folder as output_folder
from hf_purify.provenance import Provenance, compared, hashes, read_files, read_provenance, write_provenance
from hf_purify.report import Report, read_report
from hf_purify.tensors import Difference, Tensors, difference

IDENTICAL, CONSISTENT, DIFFERS = "identical", "consistent", "differs"


@dataclass(frozen=True)
class Verification:
    """What a check has found.

    Args:
        verdict: `identical` (base and mask make the result bit for bit), `consistent` (weights were trained, and all is as the provenance
            says), or `differs`.
        base: what it was held against, with its commit.
        changed: tensors that are not the base's, by key.
        differing: tensors that are not what base and mask make; where the mask is not the whole repair, what is not as recorded.
        files: names of files whose hashes are not the recorded ones, of the result and, as `base: NAME`, of the base.
        companions: files beside the weights that are not the base's.
        oddities: what to look at in them.
        neurons, removed: masked neurons, and those with a mask of at most .01.
        figures: name -> (recorded, measured), where test data were given.
    """

    model: str
    revision: str | None
    base: str
    verdict: str
    changed: dict[str, Difference] = field(default_factory=dict)
    differing: dict[str, Difference] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    companions: dict[str, str] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)
    neurons: int = 0
    removed: int = 0
    figures: dict[str, tuple[float | None, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verify(model: str, base: str | None = None, revision: str | None = None, test: Any = None, **settings: Any) -> Verification:
    """Hold a published repair against its base.

    Args:
        model: folder or Hub id of a repaired checkpoint, with its `provenance.json`.
        base: folder, or `id@commit`, where it is another than the provenance names, or that names none.
        revision: of the model.
        test, settings: measure again on this data, as `measure` does: `triggers`, `test_split`, ...

    Raises:
        ConfigError: there is no provenance, or no base to hold it against.
        UnsafeCheckpoint, ModelError: one of the two cannot be read.
    """
    result = pull(model, revision)
    provenance = read_provenance(result.folder)
    origin, name = _base_of(provenance, base)
    if provenance.kind in ("repair", "adapter"):
        return _verify_alone(model, result, provenance, origin, name)
    fold = read_fold(result.folder / MASK_FILE) if provenance.complete else None
    changed, differing = compared(origin.folder, result.folder, fold)
    if fold is None:
        differing = _unrecorded(changed, provenance)
    wrong = _wrong_files(provenance, result.folder, origin.folder)
    sound = IDENTICAL if fold else CONSISTENT
    return Verification(
        model,
        result.revision,
        name,
        DIFFERS if differing or wrong else sound,
        changed,
        differing,
        wrong,
        changes(origin.folder, result.folder),
        oddities(result.folder),
        neurons=fold.neurons if fold else 0,
        removed=fold.removed if fold else 0,
        figures=_measured_again(model, result, provenance, test, settings) if test is not None else {},
    )


def apply(repair: str, to: str, output: str | Path, revision: str | None = None, overwrite: bool = False) -> Path:
    """Lay a published repair on its base, and write the repaired checkpoint.

    Args:
        repair: folder or Hub id of a repair; of a whole repaired checkpoint its mask is taken.
        to: the base: a folder, or `id@commit`.
        output: folder for the result.
        revision: of the repair.

    Raises:
        IndexMismatch: the repair belongs to other weights, or is not whole.
        OutputError: the output exists.
    """
    source, commit = split_name(to)
    with output_folder(str(output), overwrite) as out:
        given = pull(repair, revision)
        provenance = read_provenance(given.folder)
        origin = pull(source, commit)
        files = hashes(read_files(origin.folder), origin.folder)
        if wrong := _other_weights(provenance, files):
            raise IndexMismatch(
                f"the repair belongs to '{provenance.pinned or provenance.base.get('source')}', and '{to}' has other weights ({wrong[0]}): name that commit"
            )
        if out is not None:
            fold_files(origin.folder, given.folder, out)
            shutil.copyfile(given.folder / MASK_FILE, out / MASK_FILE)
            report, head = _report_of(given.folder, repair, to), read_metadata(origin.folder)
            report.save(out)
            write_provenance(
                out, "checkpoint", report, origin.folder, lambda found: make_card(report, found, Path(output).name, head), base_files=files
            )
    return Path(output)


def _report_of(folder: Path, repair: str, to: str) -> Report:
    """The report of a published repair, as one of its application: a stranger's own command is not passed on, and whose figures they are is said."""
    report = read_report(folder)
    said = f"the figures are those that came with the repair '{repair}'; nothing was measured when it was applied"
    return dataclasses.replace(report, command=shlex.join(["hf-purify", "apply", repair, "--to", to]), warnings=[*report.warnings, said])


def _base_of(provenance: Provenance, base: str | None) -> tuple[Pulled, str]:
    """The base, pulled, and what it is called."""
    named = base or provenance.pinned
    if named is None:
        raise ConfigError(
            f"the provenance names no commit of a base ('{provenance.base.get('source')}'): give it as base=... (--base), as a folder or id@commit"
        )
    source, commit = split_name(named)
    pulled = pull(source, commit)
    return pulled, f"{source}@{pulled.revision}" if pulled.revision else source


def _unrecorded(changed: Mapping[str, Difference], provenance: Provenance) -> dict[str, Difference]:
    """Changed tensors of which the provenance says something else, or nothing."""
    return {k: d for k, d in changed.items() if provenance.changed.get(k) != dataclasses.asdict(d)} | {
        k: Difference(0, 0, None, "unchanged") for k in provenance.changed.keys() - changed.keys()
    }


def _wrong_files(provenance: Provenance, result: Path, base: Path) -> list[str]:
    """Files that are there and not as recorded; what was not pulled, such as the report's page, is not looked at."""
    found = hashes(read_files(result), result)
    wrong = [name for name, known in found.items() if provenance.files.get(name) != known]
    lost = [n for n in provenance.files if n.endswith(".safetensors") and n not in found]
    return wrong + lost + [f"base: {name}" for name in _wrong_weights(provenance, base)]


def _wrong_weights(provenance: Provenance, base: Path) -> list[str]:
    """Weights of a base that are not those that a repair was made for."""
    return _other_weights(provenance, hashes([p for p in read_files(base) if p.suffix == ".safetensors"], base))


def _other_weights(provenance: Provenance, found: Mapping[str, Any]) -> list[str]:
    """Names of weights whose hashes are not the recorded ones of the base."""
    known = {n: f for n, f in provenance.base.get("files", {}).items() if n.endswith(".safetensors")}
    there = {n: f for n, f in found.items() if n.endswith(".safetensors")}
    return sorted(n for n in known.keys() | there.keys() if known.get(n) != there.get(n)) if known else []


def _verify_alone(model: str, result: Pulled, provenance: Provenance, origin: Pulled, name: str) -> Verification:
    """Of a repair without weights: whether it is what was recorded, and belongs to this base."""
    fold = read_fold(result.folder / MASK_FILE)
    with Tensors(origin.folder) as tensors:
        changed = {k: d for k, t in folded(tensors, fold) if (d := difference(tensors[k], t)) is not None}
    wrong = _wrong_files(provenance, result.folder, origin.folder)
    verdict = DIFFERS if wrong else CONSISTENT
    return Verification(model, result.revision, name, verdict, changed, {}, wrong, {}, [], fold.neurons, fold.removed)


def _measured_again(
    model: str, result: Pulled, provenance: Provenance, test: Any, settings: Mapping[str, Any]
) -> dict[str, tuple[float | None, float]]:
    """Figures of the report beside those that are measured now."""
    if not (result.folder / "config.json").is_file():
        raise ModelError(f"'{model}' is a module's weights alone, and cannot be measured by name")
    from hf_purify.purifier import measure  # all the libraries of models, which nothing else here needs

    row, old = measure(str(result.folder), test, **settings).before, provenance.after
    if row is None:
        return {}
    now = {"clean accuracy": row.clean_accuracy} | {f"ASR {t}": p for t, p in row.asr.items()}
    then = {} if old is None else {"clean accuracy": old.clean_accuracy} | {f"ASR {t}": p for t, p in old.asr.items()}
    found = {name: (p.value if (p := then.get(name)) and p.n else None, q.value) for name, q in now.items() if q}
    return found | {n: (old.utility.get(n) if old else None, v) for n, v in row.utility.items()}
