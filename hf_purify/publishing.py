"""Push a repaired checkpoint, or the repair alone, to the Hub: only what its own proofs are true of, and only in one commit.

push(folder, repository):
    provenance <- folder/provenance.json          # its hashes must be those of the files
    refuse        a victim, a repair that cost too much, what is not there whole
    card       <- README.md with the repository's name, unless someone has edited it
    upload        what the provenance names, and nothing else; weights of the repository that it does not name are taken away
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hf_purify.cards import REPOSITORY, make_card
from hf_purify.errors import ConfigError, OutputError, PublishError
from hf_purify.hub import PICKLES, read_metadata
from hf_purify.masks import MASK_FILE
from hf_purify.plain import checked
from hf_purify.provenance import CARD, FILE, Provenance, check_files, read_provenance
from hf_purify.report import read_report
from hf_purify.uploading import Target, Uploaded, look, upload

log = logging.getLogger(__name__)
WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".onnx", ".bin.index.json", *PICKLES)
PAPERS = ("report.json", "report.html", "recipe.yaml")
LOWER_IS_BETTER = ("perplexity",)
ROUNDING = 1e-9  # of a difference of two shares


@dataclass(frozen=True)
class PushConfig:
    """How to push.

    Args:
        private: make the repository private, if it is made.
        create_pr: open a pull request on a repository that exists.
        repair_only: push the mask without the weights: a few kilobytes.
        backdoored: push a victim of `implant`, which has a backdoor on purpose.
        force: push a repair that cost more than `tolerance`.
        tolerance: points of clean accuracy, or percent of another figure of use, that a repair may have cost.
        message: of the commit.
    """

    private: bool = True
    create_pr: bool = False
    repair_only: bool = False
    backdoored: bool = False
    force: bool = False
    tolerance: float = 2.0
    message: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 100:
            raise ConfigError(f"tolerance must be in 0..100 points, got {self.tolerance}")

    @classmethod
    def make(cls, **settings: Any) -> Self:
        """Build it from settings; unknown names and wrong types are errors with a suggestion."""
        return cls(**checked(cls, {k: v for k, v in settings.items() if v is not None}, "push"))


def push(folder: str | Path, repository: str, **settings: Any) -> Uploaded:
    """Push an output folder to the Hub; see `PushConfig` for the settings.

    Raises:
        ConfigError: the folder has no provenance, or a setting is wrong.
        PublishError: it should not be pushed, or cannot be.
    """
    config = PushConfig.make(**settings)
    check_repository(repository)
    path = Path(folder).expanduser()
    provenance = checked_folder(path, config)
    target = look(repository)
    files = _repair_alone(path, provenance, repository) if config.repair_only else _whole(path, provenance, repository)
    stale = tuple(name for name in target.files if name.endswith(WEIGHTS) and name not in files)
    message = config.message or _message(provenance)
    return upload(repository, files, message, target, removed=stale, private=config.private, create_pr=config.create_pr)


def check_repository(repository: str) -> None:
    """Raises ConfigError where a name is no `owner/name`."""
    if not REPOSITORY.fullmatch(repository) or ".." in repository or repository.endswith(".git"):
        raise ConfigError(f"expected the repository as owner/name, got '{repository}'")


def check_target(repository: str, create_pr: bool) -> Target:
    """Find out before a long repair whether its result can be pushed.

    Raises:
        ConfigError, PublishError: it cannot.
    """
    check_repository(repository)
    target = look(repository)
    if create_pr and target.head is None:
        raise PublishError(f"there is no '{repository}' to open a pull request on: leave create_pr (--create-pr) out, and it is made")
    return target


def checked_folder(folder: Path, config: PushConfig) -> Provenance:
    """The provenance of a folder that may be pushed.

    Raises:
        OutputError: its files are not those that the provenance speaks of.
        PublishError: a victim, a repair that cost too much, or one whose mask is not the whole of it.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder '{folder}'; expected the output of hf-purify purify")
    provenance = read_provenance(folder)
    wrong = check_files(folder, provenance)
    if wrong:
        raise OutputError(
            f"{len(wrong)} files in '{folder}' are not as the report found them, first '{wrong[0]}': the report would not be true of them. Repair the "
            "model again, or take the change back"
        )
    strange = [p.name for p in sorted(folder.iterdir()) if p.name.endswith(WEIGHTS) and p.name not in provenance.files]
    if strange:
        raise OutputError(f"'{folder}' holds weights that the report does not know: '{strange[0]}'; take them away")
    if provenance.kind == "victim" and not config.backdoored:
        raise PublishError(
            "this model was given a backdoor on purpose: to push it nevertheless, say so with backdoored=True (--backdoored)"
        )
    if config.repair_only and not provenance.complete:
        raise PublishError(
            "the repair alone cannot be pushed: its method trained weights, so mask and base do not make the result. Push the whole checkpoint, or "
            "repair with a method that scales neurons"
        )
    if (cost := cost_of(provenance)) and cost[1] > config.tolerance + ROUNDING and not config.force:
        raise PublishError(
            f"the repair cost {cost[1]:.1f} {cost[2]} of {cost[0]}, more than the tolerance of {config.tolerance:g}: repair it more gently, raise "
            "tolerance (--tolerance), or push it nevertheless with force=True (--force)"
        )
    if paths := _local_paths(provenance):
        log.warning(
            "what is pushed names paths of this machine (%s): give models and data by relative paths or Hub ids to keep them",
            ", ".join(paths),
        )
    return provenance


def _local_paths(provenance: Provenance) -> list[str]:
    """Absolute paths by which model and data were named."""
    named = [provenance.base, *(provenance.report.get(part) for part in ("clean", "test"))]
    sources = [str(part["source"]) for part in named if isinstance(part, dict) and part.get("source")]
    return [source for source in dict.fromkeys(sources) if Path(source).is_absolute()]


def cost_of(provenance: Provenance) -> tuple[str, float, str] | None:
    """What a repair cost most: the figure, how much, and its unit; None where nothing was measured before and after."""
    before, after = provenance.before, provenance.after
    if before is None or after is None:
        return None
    found = []
    if before.clean_accuracy and after.clean_accuracy and before.clean_accuracy.n and after.clean_accuracy.n:
        found.append(("clean accuracy", 100 * (before.clean_accuracy.value - after.clean_accuracy.value), "points"))
    for figure, value in before.utility.items():
        now = after.utility.get(figure)
        if value and now is not None:
            worse = now - value if figure.lower() in LOWER_IS_BETTER else value - now
            found.append((figure, 100 * worse / abs(value), "%"))
    return max(found, key=lambda cost: cost[1], default=None)


def _whole(folder: Path, provenance: Provenance, repository: str) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {name: folder / name for name in provenance.files}
    return files | _papers(folder, provenance, repository)


def _repair_alone(folder: Path, provenance: Provenance, repository: str) -> dict[str, Path | bytes]:
    """Mask, report and card; their provenance names no other files."""
    kept = {n: f for n, f in provenance.files.items() if n in (MASK_FILE, *PAPERS) or n.startswith("pictures/")}
    alone = dataclasses.replace(provenance, kind="repair", files=kept, companions={}, oddities=[])
    files: dict[str, Path | bytes] = {name: folder / name for name in kept}
    return files | _papers(folder, alone, repository, edited=False)


def _papers(folder: Path, provenance: Provenance, repository: str, edited: bool = True) -> dict[str, Path | bytes]:
    """Card and provenance; the card is written anew with the repository's name, unless it was edited.

    Args:
        edited: an edited card is kept.
    """
    card = folder / CARD
    if edited and card.is_file() and hashlib.sha256(card.read_bytes()).hexdigest() != provenance.card:
        return {CARD: card.read_bytes(), FILE: (folder / FILE).read_bytes()}
    text = make_card(read_report(folder), provenance, repository, read_metadata(folder))
    named = dataclasses.replace(provenance, card=hashlib.sha256(text.encode()).hexdigest())
    return {CARD: text.encode(), FILE: named.to_json().encode()}


def _message(provenance: Provenance) -> str:
    method = provenance.report.get("method", {}).get("name", "none")
    what = {"victim": "Victim", "repair": "Repair", "adapter": "Repair"}.get(provenance.kind, "Purified checkpoint")
    return f"{what} ({method}) by hf-purify"


def push_written(repository: str, write: Callable[[Path], None], folder: str | None, **settings: Any) -> Uploaded:
    """Push what a job has written, or what it left in memory.

    Args:
        write: writes the output folder, where the job has none.
        folder: its output.
    """
    if folder is not None:
        return push(folder, repository, **settings)
    check_target(repository, PushConfig.make(**settings).create_pr)
    with tempfile.TemporaryDirectory() as work:
        write(Path(work))
        return push(work, repository, **settings)
