"""What was filled in on the page, as the command line of a run: a list of arguments, which no shell ever reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_purify.errors import ConfigError, shown

HUB = re.compile(r"(?:hf-hub:)?\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Request:
    """What a scan and a repair have in common. Empty texts are left to the command line's defaults.

    Args:
        model: checkpoint folder or Hub id.
        clean: clean data: Hub id, folder of images, or Parquet file.
        samples: clean samples to draw.
        split, device: as the command line has them.
    """

    model: str
    clean: str
    samples: int | None = None
    split: str = ""
    device: str = ""

    def checked(self, public: bool) -> Request:
        """The request without blanks around its texts.

        Args:
            public: strangers reach the page: only what lies on the Hub may be named, and no file of this machine.

        Raises:
            ConfigError: something is missing, or cannot be a name.
        """
        model = checked_text("model", self.model, "a checkpoint folder, or owner/name on the Hub", public)
        clean = checked_text("data", self.clean, "a data set of the Hub as owner/name, a folder of images, or a Parquet file", public)
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"clean samples: expected at least 1, got {self.samples}")
        return Request(model, clean, self.samples, self.split.strip(), self.device.strip())

    def arguments(self, output: Path) -> list[str]:
        """Options and, behind `--`, the model: nothing that was filled in is read as an option."""
        given = {"clean": self.clean, "samples": self.samples, "split": self.split, "device": self.device, "output": output}
        return [f"--{name}={value}" for name, value in given.items() if value not in (None, "")]


@dataclass(frozen=True)
class KnownTrigger:
    """What the figures of a repair are measured with, where the trigger is known; the repair itself never sees it."""

    test: str = ""
    trigger: str = ""
    target: int | None = None
    rule: str = ""

    def arguments(self, public: bool) -> list[str]:
        """The options, or none where nothing was filled in.

        Raises:
            ConfigError: a trigger without test data.
        """
        if not self.test.strip():
            if self.trigger.strip():
                raise ConfigError("a trigger is measured on labelled test data: name some, or leave the trigger empty")
            return []
        test = checked_text("test data", self.test, "a data set", public)
        given = {"test": test, "trigger": self.trigger.strip()}
        if given["trigger"]:
            given |= {"target": "" if self.target is None else str(self.target), "rule": self.rule}
        return [f"--{name}={value}" for name, value in given.items() if value]


def checked_text(what: str, text: str, expected: str, public: bool = False) -> str:
    """A name that was filled in.

    Raises:
        ConfigError: it is empty, holds control characters, or is no name of the Hub where only those are good.
    """
    text = text.strip()
    if not text:
        raise ConfigError(f"no {what} given; expected {expected}")
    if not text.isprintable():
        raise ConfigError(f"{what}: expected {expected}, got control characters in {shown(text)}")
    if public and not HUB.fullmatch(text):
        raise ConfigError(
            f"{what}: expected a name on the Hub, as owner/name, got {shown(text)}; files can be named where hf-purify runs for you"
        )
    return text


def scan(request: Request, output: Path, suspects: str = "", public: bool = False) -> list[str]:
    """The command line of a scan.

    Args:
        suspects: samples to rank by suspicion, if any.
    """
    ranked = [f"--suspects={checked_text('suspects', suspects, 'a data set', public)}"] if suspects.strip() else []
    return ["scan", *request.arguments(output), *ranked, "--", request.model]


def purify(
    request: Request,
    output: Path,
    method: str,
    settings: str = "",
    known: Sequence[str] = (),
    begin: Path | None = None,
    controls: bool = True,
) -> list[str]:
    """The command line of a repair.

    Args:
        settings: of the method, as `name=value`, one a line.
        known: arguments of a trigger that is known.
        begin: the folder of the scan that the repair begins with.
        controls: show the repair beside the controls.
    """
    options = [f"--option={line.strip()}" for line in settings.splitlines() if line.strip()]
    scanned = [f"--from-scan={begin}"] if begin else []
    shown_beside = "--controls" if controls else "--no-controls"
    return ["purify", *request.arguments(output), f"--method={method}", *options, *known, *scanned, shown_beside, "--", request.model]
