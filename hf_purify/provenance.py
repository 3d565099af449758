"""`provenance.json`: what a repaired checkpoint came from and what was done to it, for machines; with the hashes of all files before and after.

`hub_cards/provenance.schema.json` describes it. A push is refused where the hashes are not those of the files, and `verify` holds a
downloaded checkpoint against it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from tqdm.auto import tqdm

from hf_purify.companions import changes, oddities
from hf_purify.errors import ConfigError, OutputError
from hf_purify.filenames import check_name
from hf_purify.files import replace_text
from hf_purify.folding import PROVENANCE, Fold, read_fold
from hf_purify.hub import ALLOWED
from hf_purify.masks import MASK_FILE
from hf_purify.plain import checked
from hf_purify.report import Report
from hf_purify.rows import Row
from hf_purify.tensors import Difference, Tensors, difference

FORMAT = "hf-purify-provenance/1"
FILE, CARD = PROVENANCE, "README.md"
KINDS = ("checkpoint", "adapter", "repair", "trained", "victim")
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{64}")
SHOWN = ("title", "task", "checkpoint", "clean", "test", "method", "rows", "seed", "versions", "command", "warnings", "created")


@dataclass(frozen=True)
class Provenance:
    """What is known of a checkpoint that hf-purify wrote.

    Args:
        kind: `checkpoint` (a repaired one, whole), `adapter` (the repair for PEFT), `repair` (the mask alone), `trained` by
            `implant` on clean samples, or `victim`.
        base: `source`, `revision` (a commit, or None where it came from a folder), and its `files`.
        files: name -> `sha256` and `bytes`, of all that was written but the card and this file.
        changed: key -> how a tensor differs from the base's.
        complete: base and mask are the whole repair, bit for bit.
        companions: files beside the weights that are not the base's, and what became of them.
        oddities: what a reader should look at in them, in sentences.
        card: sha256 of the card as it was written; another one has been edited since.
        report: what the report says: figures with n, method, clean data, seed, versions, command, warnings.
    """

    kind: str
    base: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    companions: dict[str, Any] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)
    card: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read what may come from a stranger.

        Raises:
            ConfigError: another format, unknown or missing keys, or values of the wrong type.
            UnsafeCheckpoint: it names files outside its folder.
        """
        found = cls(**checked(cls, data, FILE, FORMAT))
        if found.kind not in KINDS:
            raise ConfigError(f"{FILE}: kind must be one of {', '.join(KINDS)}, got '{found.kind}'")
        _check_files(found.files, "files")
        _check_files(found.base.get("files", {}), "base.files")
        source, revision = found.base.get("source"), found.base.get("revision")
        if not isinstance(source, str | None) or not (revision is None or (isinstance(revision, str) and COMMIT.fullmatch(revision))):
            raise ConfigError(f"{FILE}: base must name a source and, if any, the commit of it in 40 hexadecimal digits, got {revision!r}")
        if not isinstance(found.report.get("rows", []), list) or not isinstance(found.report.get("method", {}), dict):
            raise ConfigError(f"{FILE}: report must have rows as a list, and a method as a mapping")
        _ = found.rows  # each of which is checked
        return found

    @property
    def rows(self) -> list[Row]:
        """The table of the report.

        Raises:
            ConfigError: what stands there is none.
        """
        return [Row.from_dict(row, f"{FILE}: rows[{i}]") for i, row in enumerate(self.report.get("rows", []))]

    @property
    def before(self) -> Row | None:
        """The row of the model before the repair."""
        return next((row for row in self.rows if row.kind == "unrepaired"), None)

    @property
    def after(self) -> Row | None:
        """The row of the repair."""
        name = self.report.get("method", {}).get("name")
        return next((row for row in self.rows if row.kind == "method" and row.name == name), None)

    @property
    def pinned(self) -> str | None:
        """The base as `id@commit`; None where it was no repository of the Hub."""
        source, revision = self.base.get("source"), self.base.get("revision")
        return f"{source}@{revision}" if source and revision else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _check_files(found: Any, where: str) -> None:
    """Raises ConfigError where entries are no hashes, UnsafeCheckpoint where a name leads elsewhere."""
    for name in found if isinstance(found, dict) else ():
        check_name(name, FILE)
    good = isinstance(found, dict) and all(
        isinstance(f, dict) and HASH.fullmatch(str(f.get("sha256"))) and isinstance(f.get("bytes"), int) for f in found.values()
    )
    if not good:
        raise ConfigError(f"{FILE}: {where} must map file names to sha256 and bytes")


def read_provenance(folder: Path) -> Provenance:
    """The provenance in a folder.

    Raises:
        ConfigError: there is none, or it is none.
    """
    file = folder / FILE
    if not file.is_file():
        raise ConfigError(
            f"'{folder}' has no {FILE}: it was not written by hf-purify, or by a version without proofs. Repair the model again"
        )
    try:
        data = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{file}' is no valid JSON: {error}") from error
    return Provenance.from_dict(data)


def hashes(files: list[Path], folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of files, by their names inside the folder."""
    found = {}
    for path in tqdm(files, desc="hash files", delay=2.0, leave=False, disable=None):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    return found


def read_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hf-purify reads, the card aside."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name not in (CARD, FILE) and any(fnmatch(p.name, a) for a in ALLOWED))


def changed_tensors(base: Path, result: Path) -> dict[str, Difference]:
    """The tensors of two checkpoints that are not the same, by key."""
    return compared(base, result)[0]


def compared(base: Path, result: Path, fold: Fold | None = None) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """The tensors of a result that are not the base's, and those that are not what the base and a repair make, by key; each is read once.

    Raises:
        IndexMismatch: the repair belongs to another model.
    """
    changed, differing = {}, {}
    with Tensors(base) as before, Tensors(result) as after:
        if fold is not None:
            fold.check(before)
        keys = dict.fromkeys([*before, *after])
        for key in tqdm(keys, desc="compare tensors", delay=2.0, leave=False, disable=None):
            old, new = before.get(key), after.get(key)
            found = difference(old, new)
            if found is not None:
                changed[key] = found
            if fold is not None and old is not None and key in fold.keys:
                found = difference(fold(key, old), new)
            if fold is not None and found is not None:
                differing[key] = found
    return changed, differing


def write_provenance(
    out: Path,
    kind: str,
    report: Report,
    base: Path | None,
    card: Callable[[Provenance], str],
    base_files: dict[str, Any] | None = None,
) -> Provenance:
    """Write card and provenance of a finished output folder, the last of its files.

    Args:
        base: folder of the checkpoint that it was made from; None where that lay in memory.
        card: makes the text of the card.
        base_files: hashes of the base's files, where they are known.
    """
    facts, mask = report.to_dict(), out / MASK_FILE
    checkpoint = facts["checkpoint"]
    compared = kind == "checkpoint" and base is not None
    found = Provenance(
        kind,
        {"source": checkpoint.get("repository", checkpoint.get("source")), "revision": checkpoint.get("revision")}
        | ({"files": base_files or hashes(read_files(base), base)} if base else {}),
        hashes(sorted(p for p in out.rglob("*") if p.is_file() and p.name not in (CARD, FILE)), out),
        {k: dataclasses.asdict(d) for k, d in changed_tensors(base, out).items()} if compared and base else {},
        mask.is_file() and read_fold(mask).complete,
        changes(base, out) if compared and base else {},
        oddities(out),
        report={key: facts[key] for key in SHOWN} | {"verdict": report.verdict},
    )
    text = card(found)
    replace_text(out / CARD, text)
    found = dataclasses.replace(found, card=hashlib.sha256(text.encode()).hexdigest())
    replace_text(out / FILE, found.to_json())
    return found


def check_files(folder: Path, provenance: Provenance) -> list[str]:
    """Names of recorded files that are not in a folder, or not as they were written.

    Raises:
        OutputError: a recorded file is a link.
    """
    wrong = []
    for name, known in provenance.files.items():
        path = folder / name
        if path.is_symlink():
            raise OutputError(f"'{path}' is a link; expected the file that was written")
        if not path.is_file() or hashes([path], folder)[name] != known:
            wrong.append(name)
    return wrong
