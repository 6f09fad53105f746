"""A process that uses a journal as hard as it can, and says what was acknowledged, until killed."""

import asyncio
from dataclasses import replace
from multiprocessing.connection import Connection

from tests.provider.journals import Clock, admitted, claim, outcome, session_id
from tests.support.payments import METERED, QUOTE, TOKEN
from x402mw.core.amounts import Atomic
from x402mw.provider.journal import Journal

WORKERS = 8
SESSIONS = 3
CALLS_PER_RUN = 1_000_000
TOKENS = replace(METERED, unit_price=1999)
"""A price that leaves fractions: what 333 tokens cost depends on what came before them."""
MARK = 333
RICH = replace(TOKEN, deposit=Atomic(10**12))

Ack = tuple[str, bytes, int, int]
"""What was acknowledged: (admitted | started | marked | settled, session, seq, amount)."""


def run(path: str, number: int, acks: Connection) -> None:
    """Makes calls on the journal until the process is killed. `number` makes its seqs fresh."""
    asyncio.run(_work(path, number, acks))


async def _work(path: str, number: int, acks: Connection) -> None:
    journal = Journal.open(path, clock=Clock())
    workers = (_worker(journal, number, index, acks) for index in range(WORKERS))
    await asyncio.gather(*workers)


async def _worker(journal: Journal, number: int, index: int, acks: Connection) -> None:
    for count in range(CALLS_PER_RUN):
        seq = (number * CALLS_PER_RUN + count) * WORKERS + index
        session = session_id(seq % SESSIONS)
        metered = count % 2 == 0
        terms = TOKENS if metered else QUOTE
        what = claim(seq, cumulative=10**12, session=session, terms=terms, token=RICH)
        call = await admitted(journal, what)
        acks.send(("admitted", session, seq, 0))
        if metered:
            await journal.start(call, terms.base)
            acks.send(("started", session, seq, terms.base))
            await journal.mark(call, MARK)
            acks.send(("marked", session, seq, MARK))
        used = None if count % 5 == 0 else 777
        settled = await journal.settle(call, used=used, outcome=outcome(b"%d" % seq))
        acks.send(("settled", session, seq, settled.charge))
