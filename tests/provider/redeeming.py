"""A provider as far as redeeming is concerned, at an escrow that does as a test says."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio

from tests.provider.journals import Clock, admitted, claim, session_id
from tests.provider.scripted_escrow import ScriptedEscrow
from tests.support.payments import TOKEN
from x402mw.core.gate import Claim
from x402mw.provider.journal import Journal
from x402mw.provider.link import EscrowLink
from x402mw.provider.redeemer import Redeemer

SEQS = itertools.count(1)
A, B, C = (session_id(number) for number in (1, 2, 3))


@dataclass
class Shop:
    """A provider as far as redeeming is concerned. One call costs 1000."""

    journal: Journal
    link: EscrowLink
    redeemer: Redeemer
    escrow: ScriptedEscrow
    clock: Clock

    def claim(self, session: bytes, **changes: Any) -> Claim:
        """The next claim on a session."""
        token = replace(TOKEN, journal=self.journal.journal_id)
        return claim(next(SEQS), session=session, token=token, **changes)

    async def sell(self, session: bytes, calls: int = 1) -> None:
        """Charges some calls."""
        for _ in range(calls):
            call = await admitted(self.journal, self.claim(session))
            await self.journal.settle(call, used=0, outcome=None)

    async def stop(self) -> None:
        """Ends everything but the task, as a killed process would."""
        await self.link.stop()
        self.journal.close()


async def open_shop(
    place: Path | str, escrow: ScriptedEscrow, clock: Clock, **changes: Any
) -> Shop:
    """Opens the shop; its redeemer's task is not started."""
    journal = Journal.open(str(place), clock=clock)
    link = EscrowLink(journal, escrow.client(), clock=clock)
    # The tests move our clock; theirs would stay, and ours count as wrong.
    escrow.date = None
    await link.start()
    redeemer = Redeemer(
        journal, link, **{"contact_seconds": 0.0, "round_seconds": 0.01, "by_age": 5, **changes}
    )
    return Shop(journal, link, redeemer, escrow, clock)


async def until(condition: Callable[[], object]) -> None:
    """Waits until a condition holds."""
    with anyio.fail_after(10):
        while not condition():
            # What is waited for happens in a task of its own and has no event.
            with anyio.move_on_after(0.005):
                await anyio.sleep_forever()


def amounts(escrow: ScriptedEscrow) -> list[list[str]]:
    """The amounts of each redemption that reached the escrow."""
    return [[item["amount"] for item in body["items"]] for body in escrow.asked("redeem")]
