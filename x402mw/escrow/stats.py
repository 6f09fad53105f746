"""Public figures of a live service that give nobody's private ones away.

Every figure is rounded down to one digit that counts, and one below ten is 0, so no single agent,
escrow or amount shows, nor does it by asking before and after. They are made anew at most once an
hour: counting takes longer the more there is, and a request must not.
"""

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.amounts import display
from x402mw.escrow import modes, schema
from x402mw.escrow.rows import join_sum, whole_sum
from x402mw.escrow.rules.values import ENDED_STATUSES
from x402mw.escrow.settings import Settings

if TYPE_CHECKING:
    from x402mw.escrow.ledger import Ledger

FRESH_SECONDS = 60 * 60
LEAST = 10


def coarse(number: int) -> int:
    """A figure that may be shown: one digit that counts, and nothing below ten."""
    return int(str(number)[0]) * 10 ** (len(str(number)) - 1) if number >= LEAST else 0


class Stats:
    """The figures of one service, kept for an hour."""

    def __init__(self, ledger: "Ledger") -> None:
        self._ledger = ledger
        self._counting = asyncio.Lock()
        self._counted: dict[str, Any] = {}
        self._at = 0

    async def show(self) -> dict[str, Any]:
        """What anybody may know."""
        async with self._counting:
            if not self._counted or self._ledger.now() >= self._at + FRESH_SECONDS:
                settings = self._ledger.settings
                self._counted = await self._ledger.read(
                    lambda connection: count(connection, settings)
                )
                self._at = self._ledger.now()
            return {**_terms(self._ledger.settings), **self._counted, "counted_at": self._at}


def _terms(settings: Settings) -> dict[str, Any]:
    """What this service asks and gives."""
    terms = {mode: settings.terms(mode) for mode in modes.MODES}
    return {
        "network": settings.network,
        "asset": settings.asset.code,
        "fee_bps": settings.fee_bps,
        "min_escrow": {mode: display(its.min_escrow) for mode, its in terms.items()},
        "faucet": {mode: display(its.faucet_amount) for mode, its in terms.items()},
    }


async def count(connection: AsyncConnection, settings: Settings) -> dict[str, Any]:
    """Counts live agents and escrows, and what was paid through them, in whole units."""
    agents, tenants, escrows = schema.agents.c, schema.tenants.c, schema.escrows.c
    live = (
        select(func.count())
        .select_from(schema.agents)
        .join(schema.tenants, tenants.tenant == agents.tenant)
    )
    live = live.where(tenants.mode == modes.LIVE, agents.revoked_at.is_(None))
    known = (await connection.execute(live)).scalar_one()
    asset = modes.asset_of(settings.asset.code, modes.LIVE)
    query = (
        select(escrows.status, func.count(), *whole_sum(escrows.released))
        .where(escrows.asset == asset)
        .group_by(escrows.status)
    )
    rows = (await connection.execute(query)).all()
    ended = sum(number for status, number, *_ in rows if status in ENDED_STATUSES)
    every = sum(number for _, number, *_ in rows)
    paid = sum(join_sum(*halves) for _, _, *halves in rows) // settings.asset.unit
    return {
        "agents": coarse(known),
        "escrows": {"open": coarse(every - ended), "ended": coarse(ended)},
        # A sum over few escrows would tell what one of them paid.
        "released": coarse(paid) if every >= LEAST else 0,
    }
