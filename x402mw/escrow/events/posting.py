"""Sends one webhook: to public addresses only, without redirects, in limited time.

The address is checked when connecting and then connected to, so a name that answers differently the
second time gains nothing. `docs/events.md`.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import httpcore
import httpx

SECONDS_MAX = 10
ANSWER_BYTES_MAX = 1024
CONNECTIONS_MAX = 256
"""As many as are on their way at once: none waits for another within its 10 seconds."""

RESOLVING_MAX = 64
_Options = Iterable[httpcore.SOCKET_OPTION]
# All of IPv6 that is given out for the open internet.
_GLOBAL = ipaddress.ip_network("2000::/3")
# Not for the open internet, or leading to an IPv4 address, whatever a list of the language says.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            *("192.0.0.0/24", "192.88.99.0/24"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)


class Outcome(NamedTuple):
    """How a delivery ended, in a few words for the owner of the webhook."""

    delivered: bool
    text: str


class Forbidden(OSError):
    """The target is not an address that webhooks may go to."""


def is_public(text: str) -> bool:
    """Tells whether an address belongs to the open internet."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if address not in _GLOBAL:
            return False
    if any(address in network for network in _SPECIAL):
        return False
    return address.is_global and not address.is_multicast


def is_loopback(text: str) -> bool:
    """Tells whether an address is this machine."""
    return ipaddress.ip_address(text.partition("%")[0]).is_loopback


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to what a name resolves to, once all of that was allowed."""

    def __init__(self, names: Executor, *, local: bool, plain: bool) -> None:
        self._backend = httpcore.AnyIOBackend()
        self._names = names
        self._local, self._plain = local, plain

    def _allows(self, address: str) -> bool:
        if self._plain:
            return self._local and is_loopback(address)
        return self._local or is_public(address)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (the interface is not ours)
        local_address: str | None = None,
        socket_options: _Options | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolves, checks, and connects to what was checked."""
        loop = asyncio.get_running_loop()
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await loop.run_in_executor(self._names, ask)
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not addresses or not all(map(self._allows, addresses)):
            raise Forbidden
        return await self._backend.connect_tcp(
            addresses[0], port, timeout, local_address, socket_options
        )

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


class Poster:
    """Sends webhooks; `local` also to this machine and its network, and there without TLS."""

    def __init__(self, *, local: bool, context: ssl.SSLContext | None = None) -> None:
        self._local = local
        self._context = context
        self._pools: dict[str, httpcore.AsyncConnectionPool] = {}
        # Its own threads: names that take long to resolve keep nothing else of the service.
        self._names = ThreadPoolExecutor(RESOLVING_MAX, "x402mw-names")

    async def post(self, url: str, headers: dict[str, str], body: bytes) -> Outcome:
        """Sends a body and says how that ended; never raises for what a receiver does."""
        try:
            async with asyncio.timeout(SECONDS_MAX):
                status = await self._post(url, headers, body)
        except TimeoutError:
            return Outcome(delivered=False, text=f"no answer in {SECONDS_MAX} seconds")
        except Forbidden:
            return Outcome(delivered=False, text="the address is not public")
        except socket.gaierror:
            return Outcome(delivered=False, text="the name does not resolve")
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            return Outcome(delivered=False, text="the connection failed")
        except ValueError:
            return Outcome(delivered=False, text="there can be no such host")
        if 300 <= status < 400:
            return Outcome(delivered=False, text=f"status {status}: redirects are not followed")
        return Outcome(delivered=200 <= status < 300, text=f"status {status}")

    async def _post(self, url: str, headers: dict[str, str], body: bytes) -> int:
        target = httpcore.URL(url.encode("ascii"))
        named = {**headers, "Host": _host(target)}
        pool = self._pool(target.scheme.decode())
        async with pool.stream("POST", target, headers=list(named.items()), content=body) as answer:
            seen = 0
            async for chunk in answer.aiter_stream():
                seen += len(chunk)
                if seen > ANSWER_BYTES_MAX:
                    break
            return int(answer.status)

    def _pool(self, scheme: str) -> httpcore.AsyncConnectionPool:
        if scheme not in self._pools:
            if self._context is None and scheme == "https":
                self._context = httpx.create_ssl_context(trust_env=False)
            self._pools[scheme] = httpcore.AsyncConnectionPool(
                ssl_context=self._context,
                max_connections=CONNECTIONS_MAX,
                keepalive_expiry=30,
                network_backend=_Checked(self._names, local=self._local, plain=scheme == "http"),
            )
        return self._pools[scheme]

    async def close(self) -> None:
        """Closes what is open."""
        for pool in self._pools.values():
            await pool.aclose()
        self._names.shutdown(wait=False, cancel_futures=True)


def _host(url: httpcore.URL) -> str:
    """The Host header: with the port, unless it is the scheme's own."""
    host, usual = url.host.decode(), {b"https": 443, b"http": 80}[url.scheme]
    host = f"[{host}]" if ":" in host else host
    return host if url.port in (None, usual) else f"{host}:{url.port}"
