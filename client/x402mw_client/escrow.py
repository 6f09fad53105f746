"""The escrow's HTTP API, written once for async and sync callers.

`operations` and its sisters (`manual_`, `account_`, `event_operations`) say what can be asked, as
plain values; `AsyncEscrowClient` and `EscrowClient` only carry that out. Their methods are one
table, `_Methods`.
Every operation that changes something carries an `Idempotency-Key`, so a repeated call can never
move money twice; what is safe to repeat is repeated a few times before `EscrowUnavailable` is
raised.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel

from x402mw.core.errors import EscrowRefused, EscrowUnavailable, Malformed
from x402mw.core.messages import validate
from x402mw.core.strict import dumps, loads_object
from x402mw_client import account_operations as accounts
from x402mw_client import event_operations as events
from x402mw_client import manual_operations as manual
from x402mw_client import operations
from x402mw_client.events_stream import EventStream
from x402mw_client.methods import Method, Series, Walk
from x402mw_client.operations import AnyEscrow, Listing, Operation, Steps
from x402mw_client.records import Page
from x402mw_client.secure import check_api_key, check_secure
from x402mw_client.webhooks import Event

PROBLEM = "urn:x402mw:problem:"

T = TypeVar("T", bound=BaseModel)
Made = TypeVar("Made")


class _Methods:
    """The operations as methods, and what both clients share."""

    # The service.
    health = Method(operations.health)
    keys = Method(operations.keys)
    stats = Method(operations.stats)

    # Our account, its keys and transfers.
    register_agent = Method(accounts.register_agent)
    me = Method(accounts.me)
    find_handle = Method(accounts.find_handle)
    claim_faucet = Method(accounts.claim_faucet)
    revoke_myself = Method(accounts.revoke_myself)
    list_api_keys = Method(accounts.list_api_keys)
    create_api_key = Method(accounts.create_api_key)
    rotate_api_key = Method(accounts.rotate_api_key)
    revoke_api_key = Method(accounts.revoke_api_key)
    transfer = Method(accounts.transfer)
    get_transfer = Method(accounts.get_transfer)
    list_transfers = Method(accounts.list_transfers)
    iter_transfers = Walk(accounts.iter_transfers)

    # Escrows of both kinds.
    status = Method(operations.status)
    list_escrows = Method(operations.list_escrows)
    iter_escrows = Walk(operations.iter_escrows)
    topup = Method(operations.topup)
    extend = Method(operations.extend)
    release = Method(operations.release)
    close = Method(operations.close)

    list_history = Method(events.list_history)
    iter_history = Walk(events.iter_history)
    pause = Method(events.pause)
    resume = Method(events.resume)

    # Manual escrows.
    lock = Method(manual.lock)
    create_timed_escrow = Method(manual.create_timed_escrow)
    release_partial = Method(manual.release_partial)
    settle = Method(manual.settle)
    settle_share = Series(manual.settle_share)
    settle_performance = Series(manual.settle_performance)
    refund = Method(manual.refund)
    return_money = Method(manual.return_money)
    deliver = Method(manual.deliver)
    approve = Method(manual.approve)
    reject = Method(manual.reject)
    present_outcome = Method(manual.present_outcome)
    dispute = Method(manual.dispute)
    add_evidence = Method(manual.add_evidence)
    withdraw_dispute = Method(manual.withdraw_dispute)
    resolve_dispute = Method(manual.resolve_dispute)
    list_cases = Method(manual.list_cases)
    list_disputes = Method(manual.list_disputes)
    iter_disputes = Walk(manual.iter_disputes)

    # Sessions.
    register_journal = Method(operations.register_journal)
    open_session = Method(operations.open_session)
    renew_token = Method(operations.renew_token)
    redeem = Method(operations.redeem)
    changes = Method(operations.changes)

    # Webhooks.
    create_webhook = Method(events.create_webhook)
    list_webhooks = Method(events.list_webhooks)
    delete_webhook = Method(events.delete_webhook)
    rotate_webhook = Method(events.rotate_webhook)
    list_deliveries = Method(events.list_deliveries)
    iter_deliveries = Walk(events.iter_deliveries)
    redeliver = Method(events.redeliver)

    # For admins of a tenant, and the operator.
    list_agents = Method(accounts.list_agents)
    iter_agents = Walk(accounts.iter_agents)
    list_agent_escrows = Method(accounts.list_agent_escrows)
    iter_agent_escrows = Walk(accounts.iter_agent_escrows)
    agent_escrow_status = Method(accounts.agent_escrow_status)
    revoke_agent = Method(accounts.revoke_agent)
    book_deposit = Method(accounts.book_deposit)
    book_withdrawal = Method(accounts.book_withdrawal)
    book_fees = Method(accounts.book_fees)

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = check_secure(httpx.URL(url.rstrip("/")))
        self._api_key = check_api_key(api_key)
        # In the clear the API key stays on this machine: no proxy of the environment sees it.
        self._encrypted = self.url.scheme == "https"
        self.last_date: float | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.url)!r})"

    def _request(self, operation: Operation[Any], **more: str) -> httpx.Request:
        headers = {"Accept": "application/json", **more}
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
            extensions={"timeout": httpx.Timeout(operation.timeout_seconds).as_dict()},
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
            except EscrowRefused as refusal:
                raise _weigh(operation, problem, refusal) from problem
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

    async def watch(
        self, escrow: AnyEscrow | None = None, *, since: str | None = None
    ) -> AsyncIterator[Event]:
        """Goes through what happens to an escrow, or to all of ours, as it happens; never ends.

        From now on, or after the event with the id `since` ("0": from the beginning). A connection
        that breaks is made again, and no event is missed or comes twice. Raises
        `EscrowUnavailable` when that has failed for some minutes; `since` goes on from there.
        """
        stream = EventStream(escrow, since)
        while True:
            await asyncio.sleep(stream.pause())
            try:
                async for event in self._listen(stream):
                    yield event
            except (httpx.RequestError, EscrowUnavailable) as error:
                stream.problem = error

    async def _listen(self, stream: EventStream) -> AsyncIterator[Event]:
        request = self._request(stream.operation, **stream.headers)
        answer = await self._client.send(request, stream=True)
        try:
            if not answer.is_success:
                await answer.aread()
                self._read(stream.operation, answer)
            async for line in answer.aiter_lines():
                if (event := stream.take(line)) is not None:
                    yield event
        finally:
            await answer.aclose()

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
            except EscrowRefused as refusal:
                raise _weigh(operation, problem, refusal) from problem
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

    def watch(
        self, escrow: AnyEscrow | None = None, *, since: str | None = None
    ) -> Iterator[Event]:
        """As `AsyncEscrowClient.watch`."""
        stream = EventStream(escrow, since)
        while True:
            time.sleep(stream.pause())
            try:
                yield from self._listen(stream)
            except (httpx.RequestError, EscrowUnavailable) as error:
                stream.problem = error

    def _listen(self, stream: EventStream) -> Iterator[Event]:
        request = self._request(stream.operation, **stream.headers)
        answer = self._client.send(request, stream=True)
        try:
            if not answer.is_success:
                answer.read()
                self._read(stream.operation, answer)
            for line in answer.iter_lines():
                if (event := stream.take(line)) is not None:
                    yield event
        finally:
            answer.close()

    def close_connections(self) -> None:
        """Closes the connections, unless the client is the caller's."""
        if self._owned:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close_connections()


def _weigh(operation: Operation[T], lost: Exception | None, refusal: EscrowRefused) -> Exception:
    """What a refusal comes to: after a lost answer a dead key says nothing about the first try.

    That may have been carried out, and have ended the key itself, as `revoke_myself` does.
    """
    if lost is None or operation.method == "GET" or refusal.status != HTTPStatus.UNAUTHORIZED:
        return refusal
    message = "the API key is refused now, and an earlier try without an answer may have worked"
    return EscrowUnavailable(message)


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
