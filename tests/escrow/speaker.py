"""One way to speak to the escrow through either of its clients, so that one story drives both."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.support.escrow import Agent
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient

KINDS = ("sync", "async")


class Speaker:
    """The methods of a client, all of them awaited; an iterator comes as a list.

    Plain calls run in a thread, because the escrow serves in this very loop.
    """

    def __init__(self, client: EscrowClient | AsyncEscrowClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self.client, name)

        async def call(*given: Any, **named: Any) -> Any:
            if isinstance(self.client, EscrowClient):
                return await asyncio.to_thread(lambda: _finish(method(*given, **named)))
            found = method(*given, **named)
            return await found if inspect.isawaitable(found) else [item async for item in found]

        return call


def _finish(found: Any) -> Any:
    return list(found) if isinstance(found, Iterator) else found


@asynccontextmanager
async def speaker(kind: str, url: str, agent: Agent | None = None) -> AsyncIterator[Speaker]:
    """A client of a kind, for one agent. Plain HTTP needs no certificates."""
    key = None if agent is None else agent.api_key
    if kind == "sync":
        with httpx.Client(verify=False) as http, EscrowClient(url, key, client=http) as client:
            yield Speaker(client)
    else:
        async with (
            httpx.AsyncClient(verify=False) as http,
            AsyncEscrowClient(url, key, client=http) as client,
        ):
            yield Speaker(client)
