"""Write to the Hub: one commit with all files, or none. What the servers or the wires spoil is tried again where that can do no harm."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.errors import HTTPError as WireError  # type: ignore[attr-defined]  # of httpx, whichever it is built on

from hf_purify.errors import PublishError, first_line

TRIES = 4
FIRST_WAIT = 1.0  # seconds before the second try; each further one waits twice as long
PATIENCE = 300.0  # seconds that a server may ask to wait at most
SILENCE = 120.0  # seconds without a byte after which a connection is given up
LATER = (429, 500, 502, 503, 504)
Found = TypeVar("Found")
REASONS = {
    401: "the Hub does not know you: log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "your token may not write there: make one with write access to that namespace (https://huggingface.co/settings/tokens)",
    404: "there is no such repository, or you may not see it",
    409: "the Hub says that it exists already, or that someone else is writing to it; try again",
    412: "someone else has committed to it in the meantime; nothing was written: look at the change, and push again",
    429: "the Hub asks for patience (too many requests); push again later: what has been uploaded is kept there",
}


class Target(NamedTuple):
    """A repository as it is: its head, and the files in it; no head where it is not there yet."""

    head: str | None
    files: tuple[str, ...] = ()
    private: bool | None = None


class Item(NamedTuple):
    """What a collection lists."""

    repository: str
    kind: str


@dataclass(frozen=True)
class Uploaded:
    """Where a push went.

    Args:
        url: of the repository, or of the pull request.
        commit: the one that was made, or the head where nothing had changed.
        removed: files of the repository that the commit takes away.
    """

    repository: str
    url: str
    commit: str
    pull_request: str | None = None
    removed: tuple[str, ...] = ()


def look(repository: str, kind: str = "model") -> Target:
    """What a repository holds now; the token is checked first, so that no work is done in vain.

    Raises:
        PublishError: no token, an unknown one, a name that is none, or no network.
    """

    def ask() -> Target:
        api = HfApi()
        if get_token() is None:
            raise PublishError(f"cannot push to '{repository}': {REASONS[401]}")
        role = (api.whoami().get("auth") or {}).get("accessToken", {}).get("role")
        if role == "read":
            raise PublishError(f"cannot push to '{repository}': {REASONS[403]}")
        try:
            found: Any = api.repo_info(repository, repo_type=kind)
        except RepositoryNotFoundError:
            return Target(None)
        return Target(found.sha, tuple(s.rfilename for s in found.siblings or ()), bool(found.private))

    return _patiently(repository, ask)


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    message: str,
    target: Target,
    *,
    removed: tuple[str, ...] = (),
    private: bool = True,
    create_pr: bool = False,
    kind: str = "model",
    space_sdk: str | None = None,
) -> Uploaded:
    """Commit files to a repository, which is made if it is not there.

    An upload that was cut off is done again by the same call: large files that have arrived are not sent twice, and before the commit
    nothing of them is seen.

    Args:
        files: name in the repository -> file or content.
        target: what `look` has found; the commit is made on this head, and refused if there is another by then.
        removed: files to take away in the same commit.
        create_pr: open a pull request instead.
        space_sdk: of a Space that is made.

    Raises:
        PublishError: with what to do.
    """
    api, parent = HfApi(), target.head
    if parent is None:
        if create_pr:
            raise PublishError(f"there is no '{repository}' to open a pull request on: leave create_pr (--create-pr) out, and it is made")
        _patiently(repository, lambda: api.create_repo(repository, private=private, repo_type=kind, exist_ok=True, space_sdk=space_sdk))
        parent = _patiently(repository, lambda: api.repo_info(repository, repo_type=kind)).sha

    tried: list[str] = []  # before the first try, nobody needs to ask what became of it

    def commit() -> Any:
        adding = [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content)) for name, content in files.items()]
        taking = [CommitOperationDelete(name, is_folder=False) for name in removed]
        head = api.repo_info(repository, repo_type=kind).sha if tried and not create_pr else parent
        tried.append(repository)
        done = head != parent and _holds(api, repository, kind, files)  # an earlier try came through, and its answer was lost
        return api.create_commit(
            repository,
            [*adding, *taking] if not done else adding,
            commit_message=message,
            repo_type=kind,
            parent_commit=head if done else parent,
            create_pr=create_pr,
        )

    made = _patiently(repository, commit, (429,) if create_pr else LATER)
    request = getattr(made, "pr_url", None)
    if create_pr and request is None:
        raise PublishError(f"'{repository}' holds just these files already: there is nothing to open a pull request about")
    return Uploaded(repository, request or str(made.repo_url), made.oid, request, removed)


def collect(title: str, namespace: str, items: Sequence[Item], private: bool = True) -> str:
    """Put repositories into a collection, which is made if it is not there; returns its address.

    Raises:
        PublishError: with what to do.
    """
    api = HfApi()
    made = _patiently(namespace, lambda: api.create_collection(title, namespace=namespace, private=private, exists_ok=True))
    for item in items:
        adding: Any = partial(api.add_collection_item, made.slug, item.repository, exists_ok=True)
        _patiently(item.repository, partial(adding, item_type=item.kind))
    return str(made.url)


def _holds(api: HfApi, repository: str, kind: str, files: Mapping[str, Path | bytes]) -> bool:
    """Does a repository hold just these contents under these names?"""
    info: Any = api.repo_info(repository, repo_type=kind, files_metadata=True)
    there = {s.rfilename: s for s in info.siblings or ()}
    return all(name in there and _same(content, there[name]) for name, content in files.items())


def _same(content: Path | bytes, there: Any) -> bool:
    """Is a file of a repository this one? Large ones are known by their sha256, others by git's hash."""
    if there.lfs:
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id


def _patiently(repository: str, call: Callable[[], Found], again: tuple[int, ...] = LATER) -> Found:
    """Call, and call again where the server says that it may go well later."""
    for left in reversed(range(TRIES)):
        waited = FIRST_WAIT * 2.0 ** (TRIES - left - 1)
        try:
            with _bounded():
                return call()
        except (HfHubHTTPError, RuntimeError) as error:
            answer = error if isinstance(error, HfHubHTTPError) else error.__cause__  # how the client reports the upload of a large file
            if not isinstance(answer, HfHubHTTPError):
                raise
            status = answer.response.status_code if answer.response is not None else 0
            if status not in again or not left:
                raise _refused(repository, status, answer) from None
            time.sleep(_asked(answer) or waited)
        except (HFValidationError, OfflineModeIsEnabled) as error:
            raise PublishError(f"cannot push to '{repository}': {first_line(error)}") from None
        except (
            WireError,
            ConnectionError,
            json.JSONDecodeError,
        ) as error:  # the line broke, or a page of a proxy came in the place of an answer
            if 500 not in again or not left:
                raise PublishError(
                    f"the connection to the Hub broke while pushing to '{repository}' ({first_line(error)}); nothing was committed that "
                    "you would see: push again, and what has arrived is not sent twice"
                ) from None
            time.sleep(waited)
        except ValueError as error:  # a card that the Hub refuses
            raise PublishError(f"the Hub refuses what was to be pushed to '{repository}': {' '.join(str(error).split())[:500]}") from None
    raise PublishError(f"cannot push to '{repository}'")


@contextmanager
def _bounded() -> Iterator[None]:
    """Wait for a silent server for so long and no longer; the client itself would wait for ever."""
    session: Any = get_session()
    before = session.timeout
    session.timeout = SILENCE
    try:
        yield
    finally:
        session.timeout = before


def _refused(repository: str, status: int, error: HfHubHTTPError) -> PublishError:
    reason = REASONS.get(status) or f"the Hub answered {status}: {error.server_message or first_line(error)}"
    said = f" ({error.server_message})" if status in REASONS and error.server_message else ""
    return PublishError(f"cannot push to '{repository}': {reason}{said}")


def _asked(error: HfHubHTTPError) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    asked = error.response.headers.get("Retry-After", "")
    return min(float(asked), PATIENCE) if asked.isdecimal() else 0.0
