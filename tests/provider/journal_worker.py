"""A worker in a process of its own, which does with a shared journal what a test tells it to."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from tests.provider.journals import Clock, admit, admitted, claim, outcome, session_id
from tests.support.payments import TOKEN
from x402mw.core.amounts import Atomic
from x402mw.provider.journal import Admitted, Journal, postgresql, writer
from x402mw.provider.journal.store import Durability
from x402mw.provider.journal.transaction import Transaction

RICH = replace(TOKEN, deposit=Atomic(10**12))
SESSIONS = 8
ANSWER_SECONDS = 30.0


class Worker:
    """The handle of such a process."""

    def __init__(
        self, place: str, index: int, *, round_seconds: float, durability: Durability
    ) -> None:
        """Starts it. It looks for dead workers every `round_seconds`."""
        # One server process imports everything once; each worker is a fresh fork of that.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["tests.provider.journal_worker"])
        self._line, theirs = processes.Pipe()
        self.process = processes.Process(
            target=run, args=(place, index, round_seconds, durability, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, what: str, *given: Any) -> Any:
        """Has it do something, and returns what came of it: of an error its reason or name."""
        self.tell(what, *given)
        return self.hear()

    def tell(self, what: str, *given: Any) -> None:
        """Has it begin something."""
        self._line.send((what, given))

    def hear(self) -> Any:
        """Waits for its next answer."""
        assert self._line.poll(ANSWER_SECONDS), "a worker does not answer"
        return self._line.recv()

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal; SIGSTOP has worked when this returns."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:
            while _state(self.process.pid) != "T":
                time.sleep(0.001)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def workers(
    place: str, *rounds: float, durability: Durability = "process"
) -> Iterator[list[Worker]]:
    """Workers on one journal, one for each length of rounds; they are ready when this begins."""
    found = [
        Worker(place, index, round_seconds=length, durability=durability)
        for index, length in enumerate(rounds)
    ]
    try:
        for worker in found:
            assert worker.hear() == "ready"
        yield found
    finally:
        for worker in found:
            worker.kill()


# What follows runs in the process.


def run(
    place: str, index: int, round_seconds: float, durability: Durability, line: Connection
) -> None:
    """Does what it is told until it is killed."""
    writer.ROUND_SECONDS, postgresql.FREE_ROUNDS = round_seconds, 1
    asyncio.run(_serve(Journal.open(place, durability=durability, clock=Clock()), index, line))


async def _serve(journal: Journal, index: int, line: Connection) -> None:
    hand = Hand(journal, index, line)
    line.send("ready")
    while True:
        what, given = await asyncio.to_thread(line.recv)
        try:
            line.send(await getattr(hand, what)(*given))
        except Exception as error:
            line.send(getattr(error, "reason", type(error).__name__))


class Hand:
    """What a worker can be told to do."""

    def __init__(self, journal: Journal, index: int, line: Connection) -> None:
        self.journal = journal
        self.index = index
        self.line = line
        self.calls: dict[int, Admitted] = {}

    async def admit(self, seq: int, session: int = 1) -> str:
        """Admits a call, and tells what became of it: "admitted", or a refusal's reason."""
        what = claim(seq, cumulative=10**12, session=session_id(session), token=RICH)
        call = await admit(self.journal, what)
        if isinstance(call, Admitted):
            self.calls[seq] = call
            return "admitted"
        return "replayed"

    async def start(self, seq: int, mark: int) -> None:
        """Notes that the answer began."""
        await self.journal.start(self.calls[seq], Atomic(mark))

    async def settle(self, seq: int) -> int:
        """Charges a call, and tells its charge."""
        settled = await self.journal.settle(self.calls[seq], used=0, outcome=None)
        return settled.charge

    async def leads(self) -> bool:
        """Whether this is the worker that redeems."""
        return self.journal.leads

    async def close(self) -> None:
        """Closes the journal."""
        self.journal.close()

    async def hold(self, seconds: float) -> str:
        """Stays in the middle of a batch: "holding" is sent when it is there."""

        def stay(transaction: Transaction) -> None:
            transaction.write_setting("held", str(self.index))
            self.line.send("holding")
            time.sleep(seconds)

        await self.journal._do(stay)
        return "held"

    async def load(self, seconds: float, lanes: int) -> tuple[int, list[float]]:
        """Makes calls for so long; tells how many, and how long batches waited for their turn."""
        store = self.journal._writer._store
        begin, waits = store.begin, []

        def measured() -> Any:
            asked = time.perf_counter()
            totals = begin()
            waits.append(time.perf_counter() - asked)
            return totals

        store.begin = measured
        until, done = time.monotonic() + seconds, 0

        async def lane(number: int) -> None:
            nonlocal done
            count = 0
            while time.monotonic() < until:
                count += 1
                seq = ((self.index * 1000 + number) << 32) + count
                session = session_id(seq % SESSIONS)
                what = claim(seq, cumulative=10**12, session=session, token=RICH)
                call = await admitted(self.journal, what)
                await self.journal.settle(call, used=0, outcome=outcome(b"%d" % seq))
                done += 1

        await asyncio.gather(*(lane(number) for number in range(lanes)))
        del store.begin
        return done, waits
