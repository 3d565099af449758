"""What the Hub of the tests accepts as a commit: paths, sizes, which files must be large files, and the lines of the request."""

from __future__ import annotations

import base64
import binascii
import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from hub_cards_check import check_card
from hub_store import File, Refused, Repository, folders

LIMIT = 10 * 2**20  # bytes; above it a file must be a large one
LARGE = "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar safetensors tar tflite tgz wasm xz zip zst"
ATTRIBUTES = "".join(f"*.{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE.split()).encode()


@dataclass(frozen=True)
class Proposal:
    """A commit as a client asks for it; `parent` is the commit that it expects at the head."""

    summary: str
    description: str
    parent: str | None
    operations: list[tuple[str, dict[str, Any]]]


def check_path(path: object) -> str:
    """A path inside a repository.

    Raises:
        Refused: it is none, or leaves the repository.
    """
    parts = path.split("/") if isinstance(path, str) else [""]
    if not isinstance(path, str) or "\0" in path or {"", ".", "..", ".git"}.intersection(parts):
        raise Refused(400, f"Invalid path in the commit: {path!r}")
    return path


def binary(content: bytes) -> bool:
    """Whether the beginning of a file is no text."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)  # a sample may end inside of a character
    except UnicodeDecodeError:
        return True
    return b"\0" in content


def must_be_large(path: str, size: int, sample: bytes, attributes: bytes) -> bool:
    """Whether a file has to be uploaded as a large one. Empty ones never are: there is nothing to upload."""
    patterns = [line.split()[0] for line in attributes.decode("utf-8", "replace").splitlines() if "filter=lfs" in line]
    return size > 0 and (size > LIMIT or binary(sample) or any(fnmatch(name, p) for p in patterns for name in (path, path.split("/")[-1])))


def attributes(files: Mapping[str, File]) -> bytes:
    """The `.gitattributes` that hold for a commit, those of a new repository where it has none."""
    return files[".gitattributes"].content if ".gitattributes" in files else ATTRIBUTES


def read_proposal(body: bytes) -> Proposal:
    """Read the lines of a commit's request: a header, then one operation in each line.

    Raises:
        Refused: it is no such thing, or has no summary.
    """
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        operations = [(str(line["key"]), dict(line["value"])) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(400, f"The commit is no newline-delimited JSON of keys and values: {error}") from error
    if not operations or operations[0][0] != "header":
        raise Refused(400, "The first line of a commit must be its header")
    header = operations[0][1]
    summary = header.get("summary")
    if not isinstance(summary, str) or not summary.strip():
        raise Refused(400, "A commit needs a summary")
    return Proposal(summary, header.get("description") or "", header.get("parentCommit"), operations[1:])


def apply(repository: Repository, files: Mapping[str, File], operations: list[tuple[str, dict[str, Any]]]) -> dict[str, File]:
    """The files after the operations of a commit.

    Raises:
        Refused: an operation breaks a rule; nothing of the commit is done then.
    """
    result = dict(files)
    for key, value in operations:
        if key == "deletedFolder":
            prefix = check_path(str(value.get("path", "")).removesuffix("/")) + "/"
            _delete([p for p in result if p.startswith(prefix)], prefix, result)
            continue
        path = check_path(value.get("path"))
        if key == "deletedFile":
            _delete([path] if path in result else [], path, result)
        elif key == "file":
            result[path] = _regular(path, value, attributes(files))
        elif key == "lfsFile":
            result[path] = _large(path, value, repository.objects)
        else:
            raise Refused(400, f"Unknown operation in the commit: {key}")
    if clash := folders(result) & set(result):
        raise Refused(400, f"Both a file and a folder: {', '.join(sorted(clash))}")
    if "README.md" in result and result["README.md"] != files.get("README.md"):
        errors, warnings = check_card(result["README.md"].content.decode("utf-8", "replace"), repository.kind.removesuffix("s"))
        if errors:
            message = "Invalid metadata in README.md: " + "; ".join(e["message"] for e in errors)
            raise Refused(400, message, errors=errors, warnings=warnings)
    return result


def _delete(found: list[str], name: str, files: dict[str, File]) -> None:
    if not found:
        raise Refused(404, f"A file with this name doesn't exist: {name}", "EntryNotFound")
    for path in found:
        del files[path]


def _regular(path: str, value: Mapping[str, Any], patterns: bytes) -> File:
    try:
        if value.get("encoding") != "base64":
            raise ValueError(f"the encoding is {value.get('encoding')!r}")
        content = base64.b64decode(value["content"], validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise Refused(400, f"The content of {path} must be Base64: {error}") from error
    if len(content) > LIMIT:
        raise Refused(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
    if must_be_large(path, len(content), content, patterns):
        raise Refused(400, f"Your push was rejected because it contains binary files that must be uploaded as large files: {path}")
    return File(content)


def _large(path: str, value: Mapping[str, Any], objects: Mapping[str, bytes]) -> File:
    content = objects.get(str(value.get("oid")))
    if value.get("algo") != "sha256" or content is None:
        raise Refused(400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}")
    if value.get("size", len(content)) != len(content):
        raise Refused(400, f"The size of {path} is {value['size']}, but {len(content)} bytes were uploaded")
    return File(content, lfs=True)
