"""What writers ask of the Hub of the tests: repositories, large files, commits, branches and tags."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from typing import Any
from urllib.parse import unquote

from hub_cards_check import SDKS, check_card
from hub_commits import ATTRIBUTES, apply, attributes, check_path, must_be_large, read_proposal
from hub_routes import Answer, Request, route
from hub_store import Commit, File, Refused, Repository
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def repository_of(request: Request, account_name: str) -> tuple[str, str, dict[str, Any]]:
    """The kind and the name that a request to make or delete a repository gives, and the rest of it."""
    asked = request.json
    kind = asked.get("type") or "model"
    name = f"{asked.get('organization') or account_name}/{asked.get('name')}"
    if kind not in ("model", "dataset", "space"):
        raise Refused(400, f"Invalid type of repository: {kind}")
    if not isinstance(asked.get("name"), str):
        raise Refused(400, "A repository needs a name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise Refused(400, str(error)) from error
    return f"{kind}s", name, asked


@route("POST", "/api/repos/create")
def create(request: Request) -> Answer:
    account = request.writer()
    kind, name, asked = repository_of(request, account.user)
    if not account.owns(name.split("/")[0]):
        raise Refused(403, f'You don\'t have the rights to create a {kind.removesuffix("s")} under the namespace "{name.split("/")[0]}"')
    visibility, sdk = asked.get("visibility", "private" if asked.get("private") else "public"), asked.get("sdk")
    if visibility not in ("public", "private"):
        raise Refused(400, f"Invalid visibility: {visibility}")
    if kind == "spaces" and sdk not in SDKS:
        raise Refused(400, f"A Space needs an sdk, one of {', '.join(SDKS)}; got {sdk}")
    if existing := request.hub.repositories.get((kind, name)):
        message = f"You already created this {kind.removesuffix('s')} repo: {name}"
        raise Refused(409, message, url=f"{request.hub.endpoint}/{existing.path}")
    repository = Repository(kind, name, private=visibility == "private", sdk=sdk if kind == "spaces" else None)
    files = {".gitattributes": File(ATTRIBUTES)}
    if kind == "spaces":
        files["README.md"] = File(f"---\ntitle: {name.split('/')[1]}\nsdk: {sdk}\n---\n".encode())
    repository.add(Commit(files, "initial commit", author=account.user))
    request.hub.repositories[kind, name] = repository
    return Answer.of({"url": f"{request.hub.endpoint}/{repository.path}", "name": name, "id": repository.name})


@route("DELETE", "/api/repos/delete")
def delete(request: Request) -> Answer:
    account = request.writer()
    kind, name, _ = repository_of(request, account.user)
    request.writable(kind, name)
    del request.hub.repositories[kind, name]
    return Answer.of({})


@route("PUT", "/api/{kind}/{name}/settings")
def settings(request: Request, kind: str, name: str) -> Answer:
    repository, _ = request.writable(kind, name)
    asked = request.json
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        if asked["gated"] not in (False, "auto", "manual"):
            raise Refused(400, f"gated must be auto, manual or false, got {asked['gated']!r}")
        repository.gated = asked["gated"]
    return Answer.of({"private": repository.private, "gated": repository.gated})


@route("POST", "/api/validate-yaml")
def validate(request: Request) -> Answer:
    asked = request.json
    errors, warnings = check_card(str(asked.get("content", "")), asked.get("repoType") or "model")
    return Answer.of({"errors": errors, "warnings": warnings}, 400 if errors else 200)


@route("POST", "/api/{kind}/{name}/preupload/{rev}")
def preupload(request: Request, kind: str, name: str, rev: str) -> Answer:
    """Which files have to be uploaded as large ones, and what is there under their names."""
    repository, _ = request.writable(kind, name, pull_request=by_pull_request(request, rev))
    files = repository.files(rev)
    answers = []
    for asked in request.json.get("files", []):
        path, size = check_path(asked.get("path")), asked.get("size")
        if not isinstance(size, int):
            raise Refused(400, f"The size of {path} is missing")
        large = must_be_large(path, size, base64.b64decode(asked.get("sample") or ""), attributes(files))
        mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(mode | ({"oid": files[path].etag} if path in files else {}))
    return Answer.of({"files": answers})


def by_pull_request(request: Request, rev: str) -> bool:
    """Whether this writes to a pull request, for which one needs no right to write to the branch."""
    return request.flag("create_pr") or unquote(rev).startswith("refs/pr/")


@route("POST", "/(?:(?P<kind>datasets|spaces)/)?{name}\\.git/info/lfs/objects/batch")
def batch(request: Request, kind: str | None, name: str) -> Answer:
    """Where large files are to be sent; nowhere, where they are there already."""
    asked = request.json
    ref = asked.get("ref", {}).get("name", "")
    repository, _ = request.writable(kind or "models", name, pull_request=not ref or ref.startswith("refs/pr/"))
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise Refused(400, "Only uploads by SHA-256 are served")
    if "basic" not in asked.get("transfers", ["basic"]):
        raise Refused(400, "Only the basic transfer is served")
    objects = []
    for item in asked.get("objects", []):
        oid, size = item.get("oid"), item.get("size")
        if not re.fullmatch("[0-9a-f]{64}", str(oid)) or not isinstance(size, int) or size < 1:
            raise Refused(422, f"Not an object: {item}")
        found: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repository.objects:
            ticket = secrets.token_hex(8)
            request.hub.uploads[ticket] = (repository, oid, size)
            verify = f"{request.hub.endpoint}/{repository.path}.git/info/lfs/objects/verify"
            upload = f"{request.hub.endpoint}/lfs/{oid}?signature={ticket}"
            found["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(found)
    return Answer.of({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})


@route("PUT", "/lfs/{one}")
def upload(request: Request, one: str) -> Answer:
    """Receive a large file; the signature stands for the account, as with the storage behind the Hub."""
    repository, oid, size = request.hub.uploads.get(request.query.get("signature", [""])[0], (None, "", 0))
    if repository is None or oid != one:
        raise Refused(403, "SignatureDoesNotMatch")
    digest = hashlib.sha256(request.body).hexdigest()
    if len(request.body) != size or digest != oid:
        raise Refused(400, f"expected {size} bytes of SHA-256 {oid}, got {len(request.body)} bytes of {digest}")
    repository.objects[oid] = request.body
    return Answer(headers={"ETag": f'"{oid}"'})


@route("POST", "/(?:(?P<kind>datasets|spaces)/)?{name}\\.git/info/lfs/objects/verify")
def verify(request: Request, kind: str | None, name: str) -> Answer:
    repository, _ = request.writable(kind or "models", name, pull_request=True)
    asked = request.json
    content = repository.objects.get(asked.get("oid", ""))
    if content is None or len(content) != asked.get("size"):
        raise Refused(404, f"The object {asked.get('oid')} of {asked.get('size')} bytes was not uploaded")
    return Answer.of({})


@route("POST", "/api/{kind}/{name}/commit/{rev}")
def commit(request: Request, kind: str, name: str, rev: str) -> Answer:
    """Make a commit on a branch or a pull request; with `create_pr`, on a pull request that is opened for it."""
    repository, account = request.writable(kind, name, pull_request=by_pull_request(request, rev))
    proposal = read_proposal(request.body)
    ref = unquote(rev).removeprefix("refs/heads/")
    head = repository.refs.get(ref)
    if head is None:
        raise Refused(404, f"Invalid rev id: {ref}", "RevisionNotFound")
    existing = repository.pull_request(ref)
    if existing and existing.author != account.user and not account.owns(repository.owner):
        raise Refused(403, "Forbidden: this pull request is another user's")
    if existing and existing.status not in ("open", "draft"):
        raise Refused(400, f"This pull request is {existing.status}")
    opens = request.flag("create_pr")
    if opens and ref != "main":
        raise Refused(400, "Pull requests are opened against the main branch")
    parent = expected_parent(repository, proposal.parent, head, ref, opens)
    files = apply(repository, repository.commits[parent].files, proposal.operations)
    if opens:
        existing = repository.discuss(proposal.summary, account.user, proposal.description, base=parent)
        ref = f"refs/pr/{existing.num}"
    sha = repository.add(Commit(files, proposal.summary, proposal.description, account.user, parent), ref)
    page = f"{request.hub.endpoint}/{repository.path}"
    facts = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": ""}
    if existing:
        existing.record("commit", account.user, subject=proposal.summary, oid=sha)
        facts["pullRequestUrl"] = f"{page}/discussions/{existing.num}"
    return Answer.of(facts)


def expected_parent(repository: Repository, asked: str | None, head: str, ref: str, opens: bool) -> str:
    """The commit that a new one follows: the head, or for a new pull request the one that is asked for."""
    if asked is None or (len(asked) >= 7 and head.startswith(asked)):
        return head
    if not opens:
        raise Refused(412, f"A commit has happened since. Please refresh and try again. (the head of {ref} is {head}, not {asked})")
    found = [sha for sha in repository.commits if sha.startswith(asked)]
    if len(asked) < 7 or len(found) != 1:
        raise Refused(404, f"Invalid rev id: {asked}", "RevisionNotFound")
    return found[0]


@route("POST", "/api/{kind}/{name}/branch/{one}")
def create_branch(request: Request, kind: str, name: str, one: str) -> Answer:
    repository, _ = request.writable(kind, name)
    branch = unquote(one)
    if branch.startswith("refs/"):
        raise Refused(400, f"Invalid reference for a branch: {branch}")
    if branch in repository.refs:
        raise Refused(409, f"Reference already exists: {branch}")
    repository.refs[branch] = repository.resolve(request.json.get("startingPoint") or "main")
    return Answer.of({})


@route("DELETE", "/api/{kind}/{name}/branch/{one}")
def delete_branch(request: Request, kind: str, name: str, one: str) -> Answer:
    repository, _ = request.writable(kind, name)
    branch = unquote(one)
    if branch == "main" or branch.startswith("refs/"):
        raise Refused(403, f"The reference {branch} cannot be deleted")
    if repository.refs.pop(branch, None) is None:
        raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return Answer.of({})


@route("POST", "/api/{kind}/{name}/tag/{rev}")
def create_tag(request: Request, kind: str, name: str, rev: str) -> Answer:
    repository, _ = request.writable(kind, name)
    tag = request.json.get("tag")
    if not isinstance(tag, str) or not tag:
        raise Refused(400, "A tag needs a name")
    if tag in repository.tags:
        raise Refused(409, f"Tag already exists: {tag}")
    repository.tags[tag] = repository.resolve(rev)
    return Answer.of({})


@route("DELETE", "/api/{kind}/{name}/tag/{one}")
def delete_tag(request: Request, kind: str, name: str, one: str) -> Answer:
    repository, _ = request.writable(kind, name)
    if repository.tags.pop(unquote(one), None) is None:
        raise Refused(404, f"Invalid rev id: {unquote(one)}", "RevisionNotFound")
    return Answer.of({})
