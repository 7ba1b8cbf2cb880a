"""The API of a daemon in this process, called without a socket: its application over real objects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.types import Message

from cachd.api.app import create_app
from cachd.config import Loaded, read
from cachd.daemon.parts import Daemon, assembled
from cachd.daemon.reload import Reload
from cachd.daemon.serve import api_services
from cachd.report.events import EventLog
from cachd.settings.tokens import TokenFile
from tests.ground.node import Answer


class Api:
    """Calls an application as a server does. `required`: what /readyz?set=required checks."""

    def __init__(self, loaded: Loaded, daemon: Daemon) -> None:
        self.daemon, self.required, self.events = daemon, list[str](), EventLog()
        reload = Reload(loaded, daemon)
        services = api_services(
            daemon,
            events=self.events,
            required=lambda: self.required,
            options=reload.as_document,
            sources=reload.sources,
        )
        token_file = loaded.config.token_file
        self.app: FastAPI = create_app(
            services,
            tokens=TokenFile(token_file) if token_file else None,
            anonymous_reads=True,
            allowed_hosts=(),
        )

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """Make a call. `body`: bytes, or a document."""
        path, _, query = path.partition("?")
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": "localhost", **({"content-type": "application/json"} if content else {})}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        given |= {"content-length": str(len(content))} if content else {}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("192.0.2.7", 1),
        }
        arriving = [{"type": "http.request", "body": content}]
        sent: list[Message] = []

        async def receive() -> Message:
            if arriving:
                return arriving.pop()
            await asyncio.Event().wait()
            raise AssertionError("this client does not hang up")

        async def send(message: Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        said = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
        answer = b"".join(message.get("body", b"") for message in sent[1:])
        is_json = said.get("content-type", "").partition(";")[0].endswith("json")
        return Answer(sent[0]["status"], json.loads(answer) if is_json else answer, said)


@asynccontextmanager
async def running(**options: object) -> AsyncIterator[Api]:
    """The API over objects with these options, while its application runs."""
    loaded = read(**options)
    with assembled(loaded.config) as daemon:
        api = Api(loaded, daemon)
        async with api.app.router.lifespan_context(api.app):
            yield api
