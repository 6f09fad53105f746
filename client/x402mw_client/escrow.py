"""The escrow's HTTP API, written once for async and sync callers.

`operations` and its sisters (`manual_`, `account_`, `event_operations`) say what can be asked, as
plain values; `AsyncEscrowClient` and `EscrowClient` only carry that out. Their methods are one
table, `_Methods`.
Every operation that changes something carries an `Idempotency-Key`, so a repeated call can never
move money twice; what is safe to repeat is repeated a few times before `EscrowUnavailable` is
raised.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import wraps
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import httpx
from pydantic import BaseModel

from x402mw.core.errors import EscrowRefused, EscrowUnavailable, InsecureOrigin, Malformed
from x402mw.core.messages import validate
from x402mw.core.strict import dumps, loads_object
from x402mw_client import account_operations as accounts
from x402mw_client import event_operations as events
from x402mw_client import manual_operations as manual
from x402mw_client import operations
from x402mw_client.operations import Listing, Operation, Steps
from x402mw_client.records import Page

TIMEOUT_SECONDS = 10.0
PROBLEM = "urn:x402mw:problem:"
_LOOPBACK = re.compile(r"127(\.[0-9]{1,3}){3}", re.ASCII)

P = ParamSpec("P")
T = TypeVar("T", bound=BaseModel)
Made = TypeVar("Made")


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
        return wraps(self._build)(lambda *given, **named: escrow.run(self._build(*given, **named)))


class _Walk(Generic[P, T]):
    """Makes a listing a method of both clients: an async iterator there, a plain one here."""

    def __init__(self, build: Callable[P, Listing[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(
        self, escrow: "AsyncEscrowClient", owner: type
    ) -> Callable[P, AsyncIterator[T]]: ...
    @overload
    def __get__(self, escrow: "EscrowClient", owner: type) -> Callable[P, Iterator[T]]: ...

    def __get__(self, escrow: "AsyncEscrowClient | EscrowClient", owner: type) -> Callable[P, Any]:
        return wraps(self._build)(lambda *given, **named: escrow.walk(self._build(*given, **named)))


class _Series(Generic[P, Made]):
    """Makes steps a method of both clients."""

    def __init__(self, build: Callable[P, Steps[Made]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(
        self, escrow: "AsyncEscrowClient", owner: type
    ) -> Callable[P, Coroutine[Any, Any, Made]]: ...
    @overload
    def __get__(self, escrow: "EscrowClient", owner: type) -> Callable[P, Made]: ...

    def __get__(self, escrow: "AsyncEscrowClient | EscrowClient", owner: type) -> Callable[P, Any]:
        return wraps(self._build)(
            lambda *given, **named: escrow.follow(self._build(*given, **named))
        )


class _Methods:
    """The operations as methods, and what both clients share."""

    # The service.
    health = _Method(operations.health)
    keys = _Method(operations.keys)
    stats = _Method(operations.stats)

    # Our account, its keys and transfers.
    register_agent = _Method(accounts.register_agent)
    me = _Method(accounts.me)
    find_handle = _Method(accounts.find_handle)
    claim_faucet = _Method(accounts.claim_faucet)
    revoke_myself = _Method(accounts.revoke_myself)
    list_api_keys = _Method(accounts.list_api_keys)
    create_api_key = _Method(accounts.create_api_key)
    rotate_api_key = _Method(accounts.rotate_api_key)
    revoke_api_key = _Method(accounts.revoke_api_key)
    transfer = _Method(accounts.transfer)
    get_transfer = _Method(accounts.get_transfer)
    list_transfers = _Method(accounts.list_transfers)
    iter_transfers = _Walk(accounts.iter_transfers)

    # Escrows of both kinds.
    status = _Method(operations.status)
    list_escrows = _Method(operations.list_escrows)
    iter_escrows = _Walk(operations.iter_escrows)
    topup = _Method(operations.topup)
    extend = _Method(operations.extend)
    release = _Method(operations.release)
    close = _Method(operations.close)

    list_history = _Method(events.list_history)
    iter_history = _Walk(events.iter_history)
    pause = _Method(events.pause)
    resume = _Method(events.resume)

    # Manual escrows.
    lock = _Method(manual.lock)
    create_timed_escrow = _Method(manual.create_timed_escrow)
    release_partial = _Method(manual.release_partial)
    settle = _Method(manual.settle)
    settle_share = _Series(manual.settle_share)
    settle_performance = _Series(manual.settle_performance)
    refund = _Method(manual.refund)
    return_money = _Method(manual.return_money)
    deliver = _Method(manual.deliver)
    approve = _Method(manual.approve)
    reject = _Method(manual.reject)
    present_outcome = _Method(manual.present_outcome)
    dispute = _Method(manual.dispute)
    add_evidence = _Method(manual.add_evidence)
    withdraw_dispute = _Method(manual.withdraw_dispute)
    resolve_dispute = _Method(manual.resolve_dispute)
    list_disputes = _Method(manual.list_disputes)
    iter_disputes = _Walk(manual.iter_disputes)

    # Sessions.
    register_journal = _Method(operations.register_journal)
    open_session = _Method(operations.open_session)
    renew_token = _Method(operations.renew_token)
    redeem = _Method(operations.redeem)
    changes = _Method(operations.changes)

    # Webhooks.
    create_webhook = _Method(events.create_webhook)
    list_webhooks = _Method(events.list_webhooks)
    delete_webhook = _Method(events.delete_webhook)
    rotate_webhook = _Method(events.rotate_webhook)
    list_deliveries = _Method(events.list_deliveries)
    redeliver = _Method(events.redeliver)

    # For admins of a tenant, and the operator.
    list_agents = _Method(accounts.list_agents)
    iter_agents = _Walk(accounts.iter_agents)
    list_agent_escrows = _Method(accounts.list_agent_escrows)
    iter_agent_escrows = _Walk(accounts.iter_agent_escrows)
    agent_escrow_status = _Method(accounts.agent_escrow_status)
    revoke_agent = _Method(accounts.revoke_agent)
    book_deposit = _Method(accounts.book_deposit)
    book_withdrawal = _Method(accounts.book_withdrawal)

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

    async def walk(self, listing: Listing[T]) -> AsyncIterator[T]:
        """Goes through a listing; a page is fetched when its first item is asked for."""
        page, seen = await self.run(listing.page(None)), 0
        while True:
            seen = _count(listing, page, seen)
            for item in page.items:
                yield item
            if page.next is None:
                return
            page = await self.run(listing.page(page.next))

    async def follow(self, steps: Steps[Made]) -> Made:
        """Carries out several operations, one after the other."""
        answer: Any = None
        while True:
            try:
                operation = steps.send(answer)
            except StopIteration as end:
                made: Made = end.value
                return made
            answer = await self.run(operation)

    async def aclose(self) -> None:
        """Closes the connections, unless the client is the caller's."""
        if self._owned:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


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

    def walk(self, listing: Listing[T]) -> Iterator[T]:
        """Goes through a listing; a page is fetched when its first item is asked for."""
        page, seen = self.run(listing.page(None)), 0
        while True:
            seen = _count(listing, page, seen)
            yield from page.items
            if page.next is None:
                return
            page = self.run(listing.page(page.next))

    def follow(self, steps: Steps[Made]) -> Made:
        """Carries out several operations, one after the other."""
        answer: Any = None
        while True:
            try:
                operation = steps.send(answer)
            except StopIteration as end:
                made: Made = end.value
                return made
            answer = self.run(operation)

    def close_connections(self) -> None:
        """Closes the connections, unless the client is the caller's."""
        if self._owned:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close_connections()


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


def _count(listing: Listing[T], page: Page[T], seen: int) -> int:
    seen += len(page.items)
    if listing.progress is not None:
        listing.progress(seen)
    return seen


def _unavailable(problem: Exception | None) -> EscrowUnavailable:
    if isinstance(problem, EscrowUnavailable):
        return problem
    return EscrowUnavailable(f"the escrow cannot be reached ({type(problem).__name__})")
