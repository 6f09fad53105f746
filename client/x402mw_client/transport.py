"""The transports that pay: put one into an `httpx` client, and priced requests are paid for."""

import asyncio

import httpx

from x402mw.core.errors import X402mwError
from x402mw_client.aside import AsyncAside, SyncAside
from x402mw_client.bodies import read_request, read_request_async
from x402mw_client.closing import close_all
from x402mw_client.drive import AsyncDriver, SyncDriver
from x402mw_client.flow import Payment, fetch
from x402mw_client.pools import CALLS_AT_ONCE, SmallPools
from x402mw_client.receipts import fetch_receipt
from x402mw_client.steps import origin_of
from x402mw_client.wallet import Wallet

_ORIGIN = "x402mw_origin"


def _may_pay(request: httpx.Request, origin: str) -> bool:
    """Whether a request is the caller's own: a redirect to another origin is never paid for.

    httpx copies `extensions` to the requests that follow a redirect, so the first origin stays.
    """
    first = request.extensions.setdefault(_ORIGIN, origin)
    return bool(first == origin) and "PAYMENT-SIGNATURE" not in request.headers


class PaymentTransport(httpx.AsyncBaseTransport):
    """An httpx transport that pays from a wallet; `inner` sends the bytes.

    `httpx.AsyncClient(transport=PaymentTransport(wallet))`. When it is closed it closes the
    wallet's sessions, so that their rest returns, unless `keep_sessions`. `inner` must not retry by
    itself; the default one uses no proxy of the environment. The cost of a call is in
    `response.extensions["x402mw_payment"]` (`Paid`), of a streamed one once its body has ended. Of
    more than `calls_at_once` calls the rest wait until answers have begun. For asyncio.
    """

    def __init__(
        self,
        wallet: Wallet,
        inner: httpx.AsyncBaseTransport | None = None,
        *,
        keep_sessions: bool = False,
        calls_at_once: int = CALLS_AT_ONCE,
    ) -> None:
        self._wallet = wallet
        self._inner = inner or SmallPools()
        self._turns = asyncio.Semaphore(calls_at_once)
        self._escrow = wallet.async_escrow()
        self._driver = AsyncDriver(self._inner, self._escrow, wallet.state.signal)
        # What is asked beside the calls takes no connection from them.
        self._second = inner or httpx.AsyncHTTPTransport()
        self._aside = AsyncAside(AsyncDriver(self._second, self._escrow, wallet.state.signal))
        self._keep_sessions = keep_sessions

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and pays for it if need be; raises the errors of `x402mw_client`."""
        origin = origin_of(request.url)
        if not _may_pay(request, origin):
            return await self._inner.handle_async_request(request)
        wallet = self._wallet.state
        try:
            outgoing = await read_request_async(request, origin, wallet.buffer_limit)
            async with self._turns:
                answer = await self._driver.run(fetch(wallet, outgoing), outgoing)
        except X402mwError as error:
            wallet.events.ended(origin, error)
            raise
        for session in wallet.purse.receipts_due():
            self._aside.tell(fetch_receipt(wallet, session))
        return answer

    async def resume(self, payment: Payment) -> httpx.Response:
        """Carries on a payment whose outcome was unknown (`PaymentHandle.resume`)."""
        try:
            answer = await self._driver.run(payment.resume(), payment.request)
        except X402mwError as error:
            self._wallet.state.events.ended(payment.request.origin, error)
            raise
        answer.request = payment.request.request
        await answer.aread()
        return answer

    async def aclose(self) -> None:
        """Closes the wallet's sessions and all connections."""
        try:
            await self._aside.aclose()
            if not self._keep_sessions:
                await self._driver.run(close_all(self._wallet.state))
        finally:
            await self._inner.aclose()
            await self._second.aclose()
            await self._escrow.aclose()


class SyncPaymentTransport(httpx.BaseTransport):
    """The same for `httpx.Client`."""

    def __init__(
        self,
        wallet: Wallet,
        inner: httpx.BaseTransport | None = None,
        *,
        keep_sessions: bool = False,
    ) -> None:
        self._wallet = wallet
        self._inner = inner or httpx.HTTPTransport()
        self._escrow = wallet.sync_escrow()
        self._driver = SyncDriver(self._inner, self._escrow, wallet.state.signal)
        self._second = inner or httpx.HTTPTransport()
        self._aside = SyncAside(SyncDriver(self._second, self._escrow, wallet.state.signal))
        self._keep_sessions = keep_sessions

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and pays for it if need be; raises the errors of `x402mw_client`."""
        origin = origin_of(request.url)
        if not _may_pay(request, origin):
            return self._inner.handle_request(request)
        wallet = self._wallet.state
        try:
            outgoing = read_request(request, origin, wallet.buffer_limit)
            answer = self._driver.run(fetch(wallet, outgoing), outgoing)
        except X402mwError as error:
            wallet.events.ended(origin, error)
            raise
        for session in wallet.purse.receipts_due():
            self._aside.tell(fetch_receipt(wallet, session))
        return answer

    def resume(self, payment: Payment) -> httpx.Response:
        """Carries on a payment whose outcome was unknown (`PaymentHandle.resume_sync`)."""
        try:
            answer = self._driver.run(payment.resume(), payment.request)
        except X402mwError as error:
            self._wallet.state.events.ended(payment.request.origin, error)
            raise
        answer.request = payment.request.request
        answer.read()
        return answer

    def close(self) -> None:
        """Closes the wallet's sessions and all connections."""
        try:
            self._aside.close()
            if not self._keep_sessions:
                self._driver.run(close_all(self._wallet.state))
        finally:
            self._inner.close()
            self._second.close()
            self._escrow.close_connections()
