"""The escrow's HTTP API, written once for async and sync callers.

`operations` says what can be asked, as plain values; `AsyncEscrowClient` and `EscrowClient` only
carry that out, and their methods are one table, `_Methods`. Every operation that moves money
carries an `Idempotency-Key`, so a repeated call can never move it twice; what is safe to repeat is
repeated a few times before `EscrowUnavailable` is raised.
"""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Generic, ParamSpec, TypeVar, overload

import httpx
from pydantic import BaseModel

from x402mw.core.errors import EscrowRefused, EscrowUnavailable, InsecureOrigin, Malformed
from x402mw.core.messages import validate
from x402mw.core.strict import dumps, loads_object
from x402mw_client import operations
from x402mw_client.operations import Operation

TIMEOUT_SECONDS = 10.0
PROBLEM = "urn:x402mw:problem:"
_LOOPBACK = re.compile(r"127(\.[0-9]{1,3}){3}", re.ASCII)

P = ParamSpec("P")
T = TypeVar("T", bound=BaseModel)


def check_secure(url: httpx.URL) -> httpx.URL:
    """Returns the URL if it is https or this very machine, else raises `InsecureOrigin`."""
    if url.scheme == "https":
        return url
    local = url.host in ("localhost", "::1") or _LOOPBACK.fullmatch(url.host) is not None
    if url.scheme == "http" and local:
        return url
    raise InsecureOrigin(f"{url.scheme}://{url.host} is neither https nor this machine")


class _Method(Generic[P, T]):
    """Makes an operation a method of both clients: a coroutine there, a plain call here."""

    def __init__(self, build: Callable[P, Operation[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(
        self, escrow: "AsyncEscrowClient", owner: type
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, escrow: "EscrowClient", owner: type) -> Callable[P, T]: ...

    def __get__(self, escrow: "AsyncEscrowClient | EscrowClient", owner: type) -> Callable[P, Any]:
        return lambda *given, **named: escrow.run(self._build(*given, **named))


class _Methods:
    """The operations as methods, and what both clients share."""

    health = _Method(operations.health)
    keys = _Method(operations.keys)
    register_agent = _Method(operations.register_agent)
    me = _Method(operations.me)
    claim_faucet = _Method(operations.claim_faucet)
    register_journal = _Method(operations.register_journal)
    open_session = _Method(operations.open_session)
    renew_token = _Method(operations.renew_token)
    topup = _Method(operations.topup)
    release = _Method(operations.release)
    close = _Method(operations.close)
    get = _Method(operations.get)
    list = _Method(operations.list_escrows)
    redeem = _Method(operations.redeem)
    changes = _Method(operations.changes)

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = check_secure(httpx.URL(url.rstrip("/")))
        self._api_key = api_key
        # In the clear the API key stays on this machine: no proxy of the environment sees it.
        self._encrypted = self.url.scheme == "https"
        self.last_date: float | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.url)!r})"

    def _request(self, operation: Operation[Any]) -> httpx.Request:
        headers = {"Accept": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        if operation.key is not None:
            headers["Idempotency-Key"] = operation.key
        if operation.body is not None:
            headers["Content-Type"] = "application/json"
        return httpx.Request(
            operation.method,
            f"{self.url}{operation.path}",
            params=operation.query or None,
            headers=headers,
            content=None if operation.body is None else dumps(operation.body),
            extensions={"timeout": httpx.Timeout(TIMEOUT_SECONDS).as_dict()},
        )

    def _read(self, operation: Operation[T], response: httpx.Response) -> T:
        self.last_date = read_date(response)
        return read_answer(operation, response)


class AsyncEscrowClient(_Methods):
    """The escrow's API for async code; `client` may be shared, and is then the caller's to close.

    `last_date` is the escrow's clock (seconds) as of its latest answer. Every method raises
    `EscrowRefused` or `EscrowUnavailable`.
    """

    def __init__(
        self, url: str, api_key: str | None = None, *, client: httpx.AsyncClient | None = None
    ) -> None:
        super().__init__(url, api_key)
        self._owned = client is None
        self._client = client or httpx.AsyncClient(trust_env=self._encrypted)

    async def run(self, operation: Operation[T]) -> T:
        """Carries out an operation, repeating what is safe to repeat."""
        problem: Exception | None = None
        for pause in operation.pauses:
            await asyncio.sleep(pause)
            try:
                return self._read(operation, await self._client.send(self._request(operation)))
            except (httpx.RequestError, EscrowUnavailable) as error:
                problem = error
        raise _unavailable(problem)

    async def aclose(self) -> None:
        """Closes the connections, unless the client is the caller's."""
        if self._owned:
            await self._client.aclose()


class EscrowClient(_Methods):
    """The escrow's API for plain code; otherwise as `AsyncEscrowClient`."""

    def __init__(
        self, url: str, api_key: str | None = None, *, client: httpx.Client | None = None
    ) -> None:
        super().__init__(url, api_key)
        self._owned = client is None
        self._client = client or httpx.Client(trust_env=self._encrypted)

    def run(self, operation: Operation[T]) -> T:
        """Carries out an operation, repeating what is safe to repeat."""
        problem: Exception | None = None
        for pause in operation.pauses:
            time.sleep(pause)
            try:
                return self._read(operation, self._client.send(self._request(operation)))
            except (httpx.RequestError, EscrowUnavailable) as error:
                problem = error
        raise _unavailable(problem)

    def close_connections(self) -> None:
        """Closes the connections, unless the client is the caller's."""
        if self._owned:
            self._client.close()


def read_answer(operation: Operation[T], response: httpx.Response) -> T:
    """Reads an answer; garbage is neither success nor refusal but `EscrowUnavailable`."""
    try:
        value = loads_object(response.content)
        if response.is_success:
            return validate(operation.answer, value)
    except Malformed as error:
        raise EscrowUnavailable(f"the escrow answered {response.status_code}: {error}") from None
    code = value.get("code")
    # "Still running" under our own key is no refusal: the repeat gets the first call's answer.
    running = response.status_code == httpx.codes.CONFLICT and "Retry-After" in response.headers
    if response.is_server_error or running or value.get("type") != f"{PROBLEM}{code}":
        raise EscrowUnavailable(f"the escrow answered {response.status_code}")
    detail = str(value.get("detail") or value.get("title") or code)
    raise EscrowRefused(detail, reason=str(code), status=response.status_code, problem=value)


def read_date(response: httpx.Response) -> float | None:
    """Reads the `Date` of an answer as seconds since the epoch."""
    try:
        date = parsedate_to_datetime(response.headers.get("Date", ""))
    except ValueError:
        return None
    return date.replace(tzinfo=date.tzinfo or UTC).timestamp()


def _unavailable(problem: Exception | None) -> EscrowUnavailable:
    if isinstance(problem, EscrowUnavailable):
        return problem
    return EscrowUnavailable(f"the escrow cannot be reached ({type(problem).__name__})")
