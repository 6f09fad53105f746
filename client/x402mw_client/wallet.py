"""The wallet: whose money it is, how much of it may go, and what was paid so far."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import httpx

from x402mw.core import ids
from x402mw.core.amounts import Atomic, display
from x402mw.core.telemetry import Telemetry
from x402mw_client.closing import close_all, close_lost
from x402mw_client.drive import AsyncDriver, SyncDriver
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient
from x402mw_client.events import Events
from x402mw_client.limits import Limits
from x402mw_client.receipts import ReceiptRefused, SignedReceipt, newest_receipt
from x402mw_client.secure import check_api_key, check_secure
from x402mw_client.sessions import Paid, State
from x402mw_client.state import BUFFER_BYTES, WalletState
from x402mw_client.steps import Story
from x402mw_client.walletfile import open_memory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a wallet has paid, holds for open calls, and has locked; display units."""

    paid: str
    held: str
    locked: str
    open_sessions: int


class Wallet:
    """Pays through one escrow, within limits that nothing an agent reads can talk it out of.

    `limits` and `deposit` (the most to lock in one session) are in display units. With `path` the
    wallet remembers everything in that one file, also over crashes, and several processes may share
    it (`docs/buyer.md`). Without, it lives in RAM, and its sessions end within the hour.
    `escrow_root` pins the escrow's root key, which else is pinned on first use; `escrow_aliases`
    are other URLs of it. `on_payment` is called with each settled `Paid`; `telemetry` takes figures
    (`docs/operations.md`). After each `receipt_every` charged calls of a session its provider is
    asked, beside the calls, for a signed receipt; `on_receipt` hears of it, or of what was wrong.
    """

    def __init__(
        self,
        *,
        escrow: str,
        api_key: str,
        limits: Limits,
        deposit: str = "1.00",
        path: str | os.PathLike[str] | None = None,
        escrow_root: str | None = None,
        escrow_aliases: Iterable[str] = (),
        buffer_limit: int = BUFFER_BYTES,
        on_payment: Callable[[Paid], None] | None = None,
        telemetry: Telemetry | None = None,
        receipt_every: int | None = None,
        on_receipt: Callable[[SignedReceipt | ReceiptRefused], None] = lambda receipt: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_secure(httpx.URL(escrow))
        check_api_key(api_key)
        self._api_key = api_key
        self._memory = open_memory(path)
        try:
            self.state = WalletState(
                escrow=escrow,
                limits=limits,
                deposit=deposit,
                memory=self._memory,
                clock=clock,
                escrow_root=escrow_root,
                aliases=escrow_aliases,
                buffer_limit=buffer_limit,
                events=Events(telemetry, on_payment),
                receipt_every=receipt_every,
                on_receipt=on_receipt,
            )
        except BaseException:
            # A wallet that does not come about must not keep its file locked.
            self._memory.close()
            raise

    def __repr__(self) -> str:
        return f"Wallet(escrow={self.state.escrow!r})"

    def async_escrow(self) -> AsyncEscrowClient:
        """A client of the escrow's API under this wallet's account."""
        return AsyncEscrowClient(self.state.escrow, self._api_key)

    def sync_escrow(self) -> EscrowClient:
        """The same for plain code."""
        return EscrowClient(self.state.escrow, self._api_key)

    @property
    def spent(self) -> Atomic:
        """What calls were charged so far, in atomic units; open calls are not in it."""
        purse = self.state.purse
        purse.look()
        with purse.lock:
            live = sum(session.charged for session in purse.sessions.values())
            return Atomic(purse.past.charged + live)

    def summary(self) -> Summary:
        """Adds up all sessions of this wallet."""
        purse = self.state.purse
        purse.look()
        with purse.lock:
            sessions = list(purse.sessions.values())
            live = [session for session in sessions if session.state is not State.CLOSED]
            return Summary(
                paid=display(purse.past.charged + sum(session.charged for session in sessions)),
                held=display(sum(session.held for session in sessions)),
                locked=display(sum(session.deposit for session in live)),
                open_sessions=len(live),
            )

    def receipt(self, session: str) -> SignedReceipt | None:
        """The provider's newest signed receipt for a session (`Paid.session`), if there is one."""
        purse = self.state.purse
        purse.look()
        with purse.lock:
            found = purse.sessions.get(ids.parse_id(ids.ESCROW, session))
            return None if found is None else newest_receipt(found)

    async def aclose(self) -> None:
        """Closes every session, so that its rest returns, and then the file."""
        await self._run_async(close_all(self.state))
        self._memory.close()

    def close(self) -> None:
        """The same for plain code."""
        self._run(close_all(self.state))
        self._memory.close()

    async def close_lost_sessions(self) -> int:
        """Closes open sessions of the account whose keys are lost; returns how many.

        Only for accounts that no other wallet uses: another's sessions would look lost too.
        """
        return await self._run_async(close_lost(self.state))

    def close_lost_sessions_sync(self) -> int:
        """The same for plain code."""
        return self._run(close_lost(self.state))

    async def _run_async(self, story: Story[T]) -> T:
        inner, escrow = httpx.AsyncHTTPTransport(), self.async_escrow()
        try:
            return await AsyncDriver(inner, escrow, self.state.signal).run(story)
        finally:
            await inner.aclose()
            await escrow.aclose()

    def _run(self, story: Story[T]) -> T:
        inner, escrow = httpx.HTTPTransport(), self.sync_escrow()
        try:
            return SyncDriver(inner, escrow, self.state.signal).run(story)
        finally:
            inner.close()
            escrow.close_connections()
