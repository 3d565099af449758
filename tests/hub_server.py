"""A Hub on the loopback that the tests start, as strict as the real one: the real client pulls from it and pushes to it over HTTP.

It answers what `huggingface_hub`, transformers, timm, datasets and evaluate ask for. Every request is kept in `requests`, with its
`Authorization` header, so that a test can say what was asked and what was sent along. Failures are ordered by `fail`, `cut`, `lose`
and `slow`. Clients have to run with `HF_HUB_DISABLE_XET=1`: large files are uploaded by the basic LFS transfer.

What it keeps is in hub_store.py, what it accepts as a commit in hub_commits.py and hub_cards_check.py, and its routes in
hub_reading.py, hub_writing.py, hub_discussions.py and hub_collections.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import hub_discussions  # noqa: F401 - these are imported for their routes
import hub_reading  # noqa: F401
import hub_writing  # noqa: F401
from hub_collections import Collection
from hub_commits import attributes, must_be_large
from hub_faults import Fault, Faults, Kind
from hub_routes import Account, Answer, Request, account_of, answer
from hub_store import Commit, File, Refused, Repository

TOKEN = "hf_mayWriteWhatIsMine"
READ_TOKEN = "hf_mayReadWhatIsMine"
OTHER_TOKEN = "hf_ofAnotherUser"


class Hub(Faults):
    """The server's content, its users and what it was asked.

    Args:
        token: The token by which `user` may write.
    """

    def __init__(self, token: str = TOKEN, user: str = "me") -> None:
        super().__init__()
        self.user = user
        self.tokens = {token: Account(user), READ_TOKEN: Account(user, "read"), OTHER_TOKEN: Account("another")}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.collections: dict[str, Collection] = {}
        self.uploads: dict[str, tuple[Repository, str, int]] = {}  # by the signature: what may be uploaded
        self.requests: list[tuple[str, str, str | None]] = []  # verb, path, Authorization header
        self.endpoint = ""
        self.lock = threading.Lock()

    def push(self, kind: str, name: str, folder: Path, ref: str = "main") -> str:
        """Commit exactly a folder's files to the repository of `kind` (models, datasets or spaces), made if need be; returns the commit."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            within, content = path.relative_to(folder).as_posix(), path.read_bytes()
            files[within] = File(content, lfs=must_be_large(within, len(content), content[:512], attributes({})))
        return repository.add(Commit(files, "Push", author=self.user, parent=repository.refs.get(ref)), ref)

    def fetched(self) -> set[str]:
        """Paths inside their repositories of all files whose content was sent."""
        return {path.split("/resolve/", 1)[1].split("/", 1)[1] for verb, path, _ in self.requests if verb == "GET" and "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for the receipt of its headers
    hub: Hub

    def log_message(self, *_: object) -> None:
        """The requests are kept, not printed."""

    def do_GET(self) -> None:
        faults = self.hub.faults_of(self.command, self.path)
        self.hub.requests.append((self.command, urlsplit(self.path).path, self.headers.get("Authorization")))
        if slow := faults.get("slow"):
            time.sleep(slow.seconds)
        body = self.received(cut="cut" in faults)
        if body is None:
            self.close_connection = True
            return
        self.send(self.answered(body, faults.get("fail")), faults)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def received(self, cut: bool) -> bytes | None:
        """The request's body; of one that is cut, half is read, and None returned."""
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            parts = []
            while (line := self.rfile.readline()) and (size := int(line, 16)):
                parts.append(self.rfile.read(size // 2 if cut else size))
                if cut or self.rfile.readline() != b"\r\n":
                    return None
            return b"".join(parts) if line and self.rfile.readline() else None
        length = int(self.headers.get("Content-Length") or 0)
        if cut and length:
            self.rfile.read(length // 2)
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None  # the client went away

    def answered(self, body: bytes, fail: Fault | None) -> Answer:
        """What the routes answer, or the failure that is ordered in their place."""
        if fail:
            ordered = Answer.of({"error": "ordered by the test"}, fail.status, fail.headers)
            return ordered if fail.body is None else Answer(fail.body, fail.status, fail.headers)
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        with self.hub.lock:
            try:
                account = account_of(self.hub, self.headers.get("Authorization"))
                return answer(Request(self.hub, self.command, url.path, query, self.headers, body, account))
            except Refused as refused:
                return Answer.of(refused.body, refused.status, refused.headers)

    def send(self, sent: Answer, faults: dict[Kind, Fault]) -> None:
        if "lose" in faults:
            self.close_connection = True
            return
        self.send_response(sent.status)
        for key, value in {**sent.headers, "Content-Length": str(len(sent.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        cut = "cut" in faults
        if self.command != "HEAD":
            self.wfile.write(sent.body[: len(sent.body) // 2] if cut else sent.body)
        self.close_connection = self.close_connection or cut


@contextmanager
def running(token: str = TOKEN) -> Iterator[Hub]:
    """A Hub that serves on a free port of the loopback while the block runs; clients find it by `HF_ENDPOINT=hub.endpoint`."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
