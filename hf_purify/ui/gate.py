"""Who may ask the server for what: pages of other origins in the same browser may not start a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

FOREIGN = (b"cross-site", b"same-site")  # another port of this machine is of the same site
READS = ("GET", "HEAD", "OPTIONS")


class OwnPageOnly:
    """Refuses requests that change something and that a browser says came from another page.

    A browser sends simple POST requests of any page to any address without asking; it only hides the answer.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] == "http" and scope["method"] not in READS and headers.get(b"sec-fetch-site") in FOREIGN:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"refused: this request came from another page"})
            return
        await self.app(scope, receive, send)
