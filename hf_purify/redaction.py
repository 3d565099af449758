"""What a text must not carry outside: tokens and passwords, and characters that steer a terminal or turn around what is read."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from urllib.parse import quote

HIDDEN = "[hidden]"
SHORTEST = 8  # letters of a secret: hiding shorter ones would tear words apart, and tell them

# Environment variables whose values are secrets: of the Hub, of experiment trackers, of storage that data sets may lie in.
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "COMET_API_KEY",
    "NEPTUNE_API_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)

# Each is linear in the length of a text, which may be a stranger's.
PATTERNS = (
    re.compile(r"(?<![A-Za-z0-9])()(?:hf_(?:oauth|jwt)_[\w.-]{16,}|(?:hf|api_org)_[A-Za-z0-9]{16,})"),
    re.compile(r"(://)[^\s/?#'\"<>]+(?=@)"),  # user and password of a URL
    re.compile(  # what a URL is opened or signed with
        r"([?&#;](?:[\w.-]{0,32}token|api_?key|key|secret|password|sig|(?:x-[\w-]{1,16}-)?(?:signature|credential))=)[^&#\s'\"<>]+",
        re.IGNORECASE,
    ),
    re.compile(r"(\bAuthorization\W{1,8}(?:Bearer|Basic|Token)\s{1,8})[^\s'\"<>,]+", re.IGNORECASE),
    re.compile(r"(\bBearer\s{1,8})(?:(?=[^\s\d]{0,64}\d)[\w.~+/=-]{6,}|[\w.~+/=-]{16,})", re.IGNORECASE),
)


def redacted(text: str) -> str:
    """A text with `[hidden]` where it holds a token, a password, or the value of one that this machine knows.

    >>> redacted("https://me:hf_x@host/a?access_token=b&c=d")
    'https://[hidden]@host/a?access_token=[hidden]&c=d'
    """
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def one_line(text: str) -> str:
    r"""A text that shows what it holds: no token, no control character, nothing that turns the direction of what is read.

    >>> one_line("a\x1b[2Jb\nc")
    'a [2Jb c'
    """
    text = redacted(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def short(text: str, most: int, tail: int = 0) -> str:
    """A text as `one_line` has it, of at most `most` characters, of which the last `tail` are kept.

    >>> short("layer1.0.conv1", 9, tail=3)
    'layer…nv1'
    """
    around = 4096  # what is far from both ends need not be searched for secrets
    if len(text) > most + 2 * around:
        text = text[: most + around] + text[len(text) - tail - around :]
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - tail - 1].rstrip()}…{line[len(line) - tail :]}"


def lines(text: str, indent: str = "") -> str:
    """A text of several lines, each as `one_line` has it.

    Args:
        indent: of all lines but the first, so that none can pass for a message of its own.
    """
    return f"\n{indent}".join(one_line(line) for line in redacted(text).split("\n"))


def _known() -> list[str]:
    """Secrets of this machine, also as URLs hold them; the longest first, as one may begin with another."""
    found = {value for name in SECRETS if len(value := os.environ.get(name, "").strip()) >= SHORTEST}
    with contextlib.suppress(OSError, RuntimeError):  # nobody logged in; or there is no home
        file = Path(os.environ.get("HF_TOKEN_PATH") or _home() / "token").expanduser()
        found |= _stored(file, file.stat().st_mtime_ns)
    return sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True) if found else []


def _home() -> Path:
    """Where huggingface_hub keeps what it stores."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{cache}/huggingface")


@functools.lru_cache(maxsize=4)
def _stored(file: Path, changed: int) -> set[str]:
    """What a login has stored; read again when it `changed`."""
    return {line for line in file.read_text("utf-8", errors="replace").split() if len(line) >= SHORTEST}
