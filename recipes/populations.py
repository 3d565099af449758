"""What populations of models share: the parts that members belong to, and the command that trains all of them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_purify.errors import NotAVictim

log = logging.getLogger(__name__)
PARTS = ("calibrate", "held-out")


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
