"""Failures that a test orders from the Hub: a status, a broken connection, a lost answer, a delay."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["fail", "cut", "lose", "slow"]


@dataclass
class Fault:
    """What happens to the requests that match, after the first `after` of them and for `times` of them."""

    kind: Kind
    verb: str
    pattern: str
    times: int = 1
    after: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0

    def takes(self, verb: str, path: str) -> bool:
        """Whether this request is hit; each that matches is counted."""
        if verb != self.verb or not re.search(self.pattern, path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return self.times >= 0


class Faults:
    """The failures that are ordered; mixed into the Hub. A pattern is searched for in the path and the query, as they are sent."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self._counting = threading.Lock()

    def fail(
        self,
        verb: str,
        pattern: str,
        status: int,
        times: int = 1,
        after: int = 0,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> None:
        """Answer with `status`, and with `body` in place of a JSON error; nothing of the request is done."""
        self.faults.append(Fault("fail", verb, pattern, times, after, status, headers or {}, body))

    def cut(self, verb: str, pattern: str, times: int = 1, after: int = 0) -> None:
        """Close the connection in the middle of the body: of the request's where it has one, else of the answer's."""
        self.faults.append(Fault("cut", verb, pattern, times, after))

    def lose(self, verb: str, pattern: str, times: int = 1, after: int = 0) -> None:
        """Do what the request asks for, then close the connection without an answer."""
        self.faults.append(Fault("lose", verb, pattern, times, after))

    def slow(self, verb: str, pattern: str, seconds: float, times: int = 1, after: int = 0) -> None:
        """Wait before the request is answered."""
        self.faults.append(Fault("slow", verb, pattern, times, after, seconds=seconds))

    def faults_of(self, verb: str, path: str) -> dict[Kind, Fault]:
        """What happens to a request, by kind; of several of a kind, the one that was ordered first."""
        with self._counting:
            hit: dict[Kind, Fault] = {}
            for fault in self.faults:
                if fault.kind not in hit and fault.takes(verb, path):
                    hit[fault.kind] = fault
            return hit
