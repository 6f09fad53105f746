"""The buyer of the fault schedules: carries out a script, and notes what became of each call.

The notes are lines of JSON in a file that is only appended to; a buyer that was killed reads them
when it starts again and goes on behind the last call that it had begun. What the caller of a call
was told is one line; a call without one belonged to a life that was killed.
"""

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.faults import shop as prices
from tests.faults.board import Board
from tests.faults.points import patch
from x402mw.core.errors import Moved, PaidOutcomeGone, PaymentOutcomeUnknown, X402mwError
from x402mw_client import Limits, PaymentHandle, PaymentTransport, SyncPaymentTransport, Wallet
from x402mw_client.drive import AsyncDriver
from x402mw_client.flow import NOT_SENT, PAYMENT
from x402mw_client.purse import Purse
from x402mw_client.sessions import Session, State

if TYPE_CHECKING:
    from tests.faults.process import World

STEP_SECONDS = 0.03
"""The pace of the caller's own patience; longer waits are hastened in this process."""
RESUMES_MAX = 6
"""How often an unknown outcome is asked for again once everything works."""
TRIES_MAX = 3
"""How many names, one after the other, a call gets that was certainly not sent."""
NO_CALLS = ("time", "release", "close", "gone")
OPEN = (State.OPEN, State.ENDED, State.DIFFERS)


class Notes:
    """The buyer's file of what happened."""

    def __init__(self, path: Path) -> None:
        self.begun = {line["n"] for line in read_notes(path) if line["e"] == "begin"}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def add(self, event: str, name: str = "", **more: Any) -> None:
        """Appends a line, in one write; one that a kill cut short stays a line of its own."""
        os.write(self._file, b"\n" + json.dumps({"e": event, "n": name, **more}).encode() + b"\n")


def read_notes(path: Path) -> list[dict[str, Any]]:
    """The notes so far. A line that a kill cut short was never written."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


class Shopper:
    """One life of the buyer."""

    def __init__(self, world: "World", board: Board, number: int, buyers: int) -> None:
        self.world = world
        self.board = board
        self.number, self.buyers = number, buyers
        self.notes = Notes(world.folder / f"notes{number}.log")
        self.open()

    def open(self) -> None:
        """Opens the wallet, and notes what it holds from an earlier life."""
        world = self.world
        self.wallet = Wallet(
            escrow=world.escrow_seen,
            api_key=world.buyer_key,
            limits=Limits(per_request="0.20", total="45.00"),
            deposit=world.deposit,
            path=world.folder / "wallet.db",
            escrow_aliases=[world.escrow_from_provider],
            clock=self.board.clock("buyer"),
        )
        for (session,) in self._ask_file("SELECT id FROM sessions"):
            self.notes.add("opened", session=f"esc_{session.hex()}")
        for session, seq, url in self._ask_file("SELECT session, seq, url FROM calls"):
            self.notes.add("held", name_in(url), seq=seq, session=f"esc_{session.hex()}")
        seconds = world.read_seconds
        if world.threads:
            self.plain = SyncPaymentTransport(self.wallet, keep_sessions=True)
            self.http: Any = httpx.Client(transport=self.plain, timeout=seconds)
        else:
            self.transport = PaymentTransport(self.wallet, keep_sessions=True)
            self.http = httpx.AsyncClient(transport=self.transport, timeout=seconds)

    def _ask_file(self, query: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.world.folder / "wallet.db")
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    async def close(self) -> None:
        """Closes the sessions and the wallet."""
        if self.world.threads:
            await asyncio.to_thread(self.http.close)
            await asyncio.to_thread(self.wallet.close)
        else:
            await self.http.aclose()
            await self.wallet.aclose()

    def _send(self, request: httpx.Request) -> Awaitable[httpx.Response]:
        if self.world.threads:
            return asyncio.to_thread(self.http.send, request)
        sent: Awaitable[httpx.Response] = self.http.send(request)
        return sent

    def _resume(self, handle: PaymentHandle) -> Awaitable[httpx.Response]:
        if self.world.threads:
            return asyncio.to_thread(handle.resume_sync, self.plain)
        return handle.resume(self.transport)

    # The script.

    async def run(self, groups: list[list[dict[str, Any]]]) -> None:
        """Carries out one group of steps after the other; the steps of a group run together.

        Of several buyers each makes its share of the calls, and the first does all else.
        """
        for number, group in enumerate(groups):
            steps = [
                (f"g{number}-{index}", step)
                for index, step in enumerate(group)
                if self._is_ours(step, number + index)
            ]
            new = [(name, step) for name, step in steps if name not in self.notes.begun]
            await asyncio.gather(*(self._step(name, step) for name, step in new))

    def _is_ours(self, step: dict[str, Any], place: int) -> bool:
        return self.number == (0 if step["kind"] in NO_CALLS else place % self.buyers)

    async def _step(self, name: str, step: dict[str, Any]) -> None:
        kind = step["kind"]
        if kind in NO_CALLS:
            self.notes.add("begin", name)
        if kind == "time":
            for role in step["roles"]:
                self.board.shift(role, step["seconds"])
        elif kind == "gone":
            self.board.provider_gone = True
            await asyncio.sleep(STEP_SECONDS)
        elif kind == "release":
            await self._quietly(partial(release, self.wallet))
        elif kind == "close":
            await self._quietly(self.close)
            self.open()
        else:
            await self._buy(name, step)

    async def _quietly(self, work: Callable[[], Any]) -> None:
        try:
            await work()
        except (X402mwError, httpx.HTTPError) as error:
            self.notes.add("failed", error=repr(error))

    async def _buy(self, name: str, step: dict[str, Any]) -> None:
        for number in range(TRIES_MAX):
            tried = f"{name}" if not number else f"{name}~{number}"
            if tried in self.notes.begun:
                continue
            self.notes.add("begin", tried)
            if await self._follow(tried, self._send(self._request(tried, step))):
                return
            await asyncio.sleep(STEP_SECONDS)

    def _request(self, name: str, step: dict[str, Any]) -> httpx.Request:
        kind, size, pause = step["kind"], step.get("size", 0), step.get("ms", 0)
        url = f"{self.world.provider_seen}/{kind}/{name}?ms={pause}"
        if kind == "words":
            return self.http.build_request("POST", url, content=b"word " * size)
        return self.http.build_request("GET", url + f"&rows={size}")

    async def _follow(self, name: str, work: Any) -> bool:
        """Follows one call to its end; tells whether it ever left this process."""
        resumed = 0
        while True:
            try:
                answer = await work
            except PaymentOutcomeUnknown as unknown:
                resumed += self.board.settling
                # Nobody will ever know: some clock had gone far ahead, and the row is gone.
                if resumed > RESUMES_MAX or "no longer knows" in str(unknown):
                    self._end(name, "unknown", error=str(unknown), **_of(unknown.handle))
                    return True
                await asyncio.sleep(STEP_SECONDS)
                work = self._resume(unknown.handle)
                continue
            except PaidOutcomeGone as gone:
                self._end(name, "gone", charge=gone.charge)
            except X402mwError as error:
                self._end(name, "refused", error=repr(error), moved=error.moved.name)
                return error.moved is not Moved.NO
            except NOT_SENT as error:
                self._end(name, "not sent", error=repr(error))
                return False
            except httpx.HTTPError as error:
                self._end(name, "cut", error=repr(error))
            else:
                self._note_answer(name, answer)
            return True

    def _note_answer(self, name: str, answer: httpx.Response) -> None:
        paid = answer.extensions.get(PAYMENT)
        if paid is None:
            self._end(name, "foreign", status=answer.status_code)
            return
        self._end(
            name,
            "answer",
            status=answer.status_code,
            charge=paid.charge,
            seq=paid.seq,
            session=paid.session,
            body=answer.text if len(answer.content) < 2000 else len(answer.content),
        )

    def _end(self, name: str, outcome: str, **more: Any) -> None:
        self.notes.add("end", name, outcome=outcome, settling=self.board.settling, **more)

    # The end.

    async def settle(self) -> None:
        """Closes everything, however often it takes, and opens the file anew each time."""
        if self.number:
            # While we have the file open, closing it is not for the first to close the sessions.
            await self._quietly(self.close)
            return
        while True:
            await self._quietly(self.close)
            self.open()
            sessions = self.wallet.state.purse.sessions.values()
            if not self.wallet.state.purse.openings and not any(s.state in OPEN for s in sessions):
                await self._quietly(self.close)
                return
            await asyncio.sleep(STEP_SECONDS)


async def release(wallet: Wallet) -> None:
    """Pays out by hand what each open session has cost so far."""
    escrow = wallet.async_escrow()
    try:
        for session in list(wallet.state.purse.sessions.values()):
            if session.state is State.OPEN and session.charged:
                await escrow.release(session.id, cumulative=session.charged)
    finally:
        await escrow.aclose()


def name_in(url: str) -> str:
    """The name of a call, out of its URL."""
    return url.rpartition("/")[2].partition("?")[0]


def expected_charges(kind: str, status: int, size: int) -> tuple[int, ...]:
    """What a whole answer may cost; nothing is expected where it depends on the calls before it."""
    if status != 200:
        return (0,)
    fixed = {"item": prices.ITEMS, "big": (prices.BIG,), "stream": (size * prices.ROW,)}
    return fixed.get(kind, ())


def _of(handle: PaymentHandle) -> dict[str, Any]:
    call = handle._payment.call
    return {} if call is None else {"seq": call.seq, "session": call.session.name}


def watch(notes: Notes) -> None:
    """Notes what only this process knows: each signed call, opened session and final receipt."""
    control, sign, add = AsyncDriver._control, Purse.sign, Purse.add

    async def note_receipt(driver: AsyncDriver, request: httpx.Request) -> httpx.Response:
        answer = await control(driver, request)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            notes.add("receipt", receipt=answer.json()["receipt"])
        return answer

    def note_sign(purse: Purse, *given: Any) -> Any:
        signed = sign(purse, *given)
        if signed is not None:
            call = signed[0]
            notes.add("signed", name_in(call.url), seq=call.seq, session=call.session.name)
        return signed

    def note_session(purse: Purse, session: Session, opening: Any) -> Session:
        session = add(purse, session, opening)
        notes.add("opened", session=session.name)
        return session

    patch("x402mw_client.drive:AsyncDriver._control", note_receipt)
    patch("x402mw_client.purse:Purse.sign", note_sign)
    patch("x402mw_client.purse:Purse.add", note_session)


async def shop(
    world: "World", board: Board, script: dict[str, Any], announce: Callable[[], None]
) -> None:
    """One life: the script, as far as it is not done, and when the faults are over, the end."""
    shopper = Shopper(world, board, script["number"], script["buyers"])
    watch(shopper.notes)
    await shopper.run(script["groups"])
    announce()
    while not board.settling:  # noqa: ASYNC110 (another process tells, in shared memory)
        await asyncio.sleep(STEP_SECONDS)
    await shopper.settle()
