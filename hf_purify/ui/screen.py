"""What a run says on its terminal: lines, and progress bars that tqdm draws over each other."""

from __future__ import annotations

import codecs
import re
from collections import deque
from dataclasses import dataclass

from hf_purify.redaction import one_line

LINES = 400
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
BAR = re.compile(r"(?:(?P<title>[^|]*?): )?\s*(?P<percent>\d{1,3})%\|[^|]*\|\s*(?P<detail>.*)")
LONGEST = 65_536  # of a line that never ends


@dataclass(frozen=True)
class Bar:
    """A progress bar.

    Args:
        title: what is done, such as `fine_tune`.
        percent: 0..100.
        detail: counts and times, as tqdm writes them.
    """

    title: str
    percent: int
    detail: str


class Screen:
    """The last lines that a run wrote, without its bars, and the bar that is drawn now. No line holds a token or steers anything.

    >>> screen = Screen()
    >>> screen.feed(b"read\\r\\nnft:  10%|#   | 2/20\\rnft:  50%|##  | 10/20 [00:01<00:01]")
    >>> screen.lines, screen.bar.percent
    (['read'], 50)
    """

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        self._pending = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, data: bytes, *, final: bool = False) -> None:
        """Take what was read; with `final` there is no more."""
        text = self._pending + self._decode(data, final) + "\n" * final
        *ended, self._pending = text.replace("\r\n", "\n").split("\n")
        for line in ended:
            drawn = [part for part in _drawn(line) if part.strip()]
            if drawn and not BAR.fullmatch(drawn[-1].strip()):
                self._lines.append(one_line(drawn[-1].rstrip()))
        self.bar = None if final else self._drawn_now()
        # of what was drawn over, the next reading needs the last one only: its newest may be cut in the middle
        self._pending = "\r".join(self._pending.split("\r")[-2:])[-LONGEST:]

    def _drawn_now(self) -> Bar | None:
        """The newest bar of the line that has not ended; a blank over it takes it away."""
        for part in reversed(_drawn(self._pending)):
            found = BAR.fullmatch(part.strip())
            if found:
                return Bar(one_line(found["title"] or ""), min(int(found["percent"]), 100), one_line(found["detail"]))
            if len(part) > 1 and part.isspace():
                return None
        return None

    @property
    def lines(self) -> list[str]:
        return list(self._lines)

    @property
    def error(self) -> str:
        """The last message of an error, with its indented lines; empty where there is none."""
        lines = self.lines
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if not starts:
            return ""
        more = lines[starts[-1] + 1 :]
        length = next((i for i, line in enumerate(more) if not line.startswith("  ")), len(more))
        return "\n".join([lines[starts[-1]].removeprefix("error: "), *(line.strip() for line in more[:length])])


def _drawn(line: str) -> list[str]:
    """What was written over each other in one line, oldest first."""
    return ESCAPES.sub("", line).split("\r")
