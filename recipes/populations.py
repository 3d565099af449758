"""What populations of models share: the parts that members belong to, and the command that trains all of them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_purify.errors import NotAVictim
from hf_purify.specs import parse_spec

log = logging.getLogger(__name__)
PARTS = ("calibrate", "held-out", "fresh")


@dataclass(frozen=True)
class Member:
    """One model of a population.

    Args:
        network: what it is.
        triggers: as `implant` takes them; none of a clean model. A second one leads to the class behind the first one's.
        target: of the attack.
        rule: `all-to-one` or `all-to-all`.
        seed: of the training.
        part: `calibrate` or `held-out`.
    """

    network: str
    triggers: tuple[str, ...] = ()
    target: int = 0
    seed: int | None = 0
    part: str = PARTS[0]
    rule: str = "all-to-one"
    classes: int = 10

    @property
    def dataset(self) -> str:
        """What it tells classes of."""
        raise NotImplementedError

    @property
    def calibrates(self) -> bool:
        """Whether the score rests on it: a clean model for data of the kind that the score is for."""
        return not self.backdoored

    @property
    def backdoored(self) -> bool:
        return bool(self.triggers)

    @property
    def kind(self) -> str:
        """`clean`, or the name of the trigger."""
        return parse_spec(self.triggers[0])[0] if self.triggers else "clean"

    @property
    def targets(self) -> tuple[int, ...]:
        """The classes that triggers lead to."""
        if self.rule == "all-to-all":
            return tuple(range(self.classes))
        return tuple(self.target + i for i in range(len(self.triggers)))

    @property
    def about(self) -> str:
        """Backdoor and seed, for a name."""
        planted = self.kind
        if self.triggers:
            planted += "-all" if self.rule == "all-to-all" else "".join(f"-t{k}" for k in self.targets)
        return f"{planted}-{'published' if self.seed is None else f's{self.seed}'}"


def of_part(members: Iterable[Any], part: str | None = None) -> Iterator[Any]:
    """Members of a part, or all, those to calibrate on first."""
    known = list(members)
    return (m for p in PARTS for m in known if m.part == p and part in (None, p))


def train_all(about: str | None, members: Iterable[Any], train: Callable[[Any, Path], object]) -> None:
    """Command line of a population: train every member that is not there yet; one whose backdoor does not take is left out."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--part", choices=PARTS)
    chosen = parser.parse_args()
    for member in tqdm(list(of_part(members, chosen.part)), desc="population"):
        try:
            train(member, chosen.folder)
        except NotAVictim as error:
            log.warning("%s: left out: %s", member.name, error)
