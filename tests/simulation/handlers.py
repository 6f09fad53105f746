"""What is sold: an app whose handlers do what the seed says, and the oracle watches each run."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.oracle import Oracle, Run
from x402mw.core.pricing import PerCall, PerUnit
from x402mw.provider.prices import Priced, PriceList

UNIT_PRICE, PER, BASE = 7, 10, 100
TOKENS_MAX, CHUNKS_MAX = 50_000, 20
TOKENS_AMOUNT = BASE + TOKENS_MAX * UNIT_PRICE // PER
MOST = {"tokens": TOKENS_MAX, "stream": CHUNKS_MAX}


def prices(quote: str) -> PriceList:
    """The price list; the price of a quote may change."""
    return {
        "GET /quote/{n}": PerCall(quote),
        "POST /tokens": Priced(
            PerUnit("token", "0.0000007", max_units=TOKENS_MAX, base="0.0001"),
        ),
        "GET /stream/{n}": Priced(PerUnit("chunk", "0.002", max_units=20), timeout_seconds=20),
        "POST /upload": Priced(PerCall("0.003"), unbound_body=True, store_body=False),
    }


@dataclass
class Work:
    """What one call's handler is to do."""

    method: str
    path: str
    body: bytes = b""
    delay: float = 0.0
    ending: str = "done"
    status: int = 200
    units: list[int] = field(default_factory=list)
    pause: float = 0.0

    @property
    def route(self) -> str:
        """Which line of the price list it is."""
        return self.path.split("/")[1]


def plan_work(rng: random.Random) -> Work:
    """Chooses a call and what becomes of it."""
    route = rng.choices(("quote", "tokens", "stream", "upload"), (5, 3, 2, 1))[0]
    delay = rng.choices((0.0, rng.uniform(0, 0.5), rng.uniform(1, 8)), (6, 3, 1))[0]
    ending = rng.choices(("done", "status", "raise", "hang"), (30, 2, 1, 0.2))[0]
    status = rng.choice((400, 404, 500, 402)) if ending == "status" else rng.choice((200, 200, 201))
    body = rng.randbytes(rng.randrange(0, 40))
    if route == "quote":
        return Work("GET", f"/quote/{rng.randrange(9)}", b"", delay, ending, status)
    if route == "upload":
        return Work("POST", "/upload", body, delay, ending, status)
    if route == "tokens":
        units = [rng.randrange(0, 60_000) for _ in range(rng.randrange(0, 3))]
        return Work("POST", "/tokens", body, delay, ending, status, units)
    units = [rng.randrange(0, 4) for _ in range(rng.randrange(1, 8))]
    pause = rng.choice((0.0, 0.0, 0.3, 1.2))
    return Work("GET", f"/stream/{rng.randrange(9)}", b"", delay, ending, status, units, pause)


class Shop:
    """The ASGI app of one provider in one of its lives."""

    def __init__(
        self, oracle: Oracle, works: dict[str, Work], name: str, life: int, now: Callable[[], float]
    ) -> None:
        self._oracle, self._works, self._name, self._life = oracle, works, name, life
        self._now = now

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Runs one handler."""
        found = dict(scope["headers"])
        call = found.get(b"x-call", b"").decode()
        work, payment = self._works[call], scope["state"].get("payment")
        if payment is None:
            self._oracle.fail(f"the handler of {call} ran unpaid")
            return
        run = self._oracle.begin(
            Run(
                call=call,
                provider=self._name,
                life=self._life,
                session=payment.session,
                seq=scope["state"]["sim_seq"],
                route=work.route,
                amount=payment.maximum,
                at=self._now(),
            )
        )
        try:
            await self._work(run, work, payment, send)
        except BaseException:
            run.failed = True
            raise
        finally:
            run.ended = True

    async def _work(self, run: Run, work: Work, payment: Any, send: Any) -> None:
        await asyncio.sleep(work.delay)
        if work.ending == "hang":
            await asyncio.sleep(300)
        if work.route == "stream" and work.ending != "status":
            await self._stream(run, work, payment, send)
            return
        if work.ending == "raise":
            raise RuntimeError("the handler failed")
        for units in work.units:
            payment.charge(**{"chunk" if work.route == "stream" else "token": units})
            run.used += units
        body = f"done {run.call}".encode()
        length = [(b"content-length", str(len(body)).encode())]
        run.status = work.status
        start = {"type": "http.response.start", "status": work.status, "headers": length}
        await send(start)
        run.begun = True
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, run: Run, work: Work, payment: Any, send: Any) -> None:
        run.status = work.status
        await send({"type": "http.response.start", "status": work.status, "headers": []})
        run.begun = True
        for units in work.units:
            payment.charge(chunks=units)
            run.used += units
            await send({"type": "http.response.body", "body": b"data ", "more_body": True})
            await asyncio.sleep(work.pause)
            if work.ending == "raise":
                raise RuntimeError("the stream broke")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def expected(run: Run) -> tuple[int, int] | None:
    """What a run may be charged at least and at most; None for a metered one, rated in a sum."""
    if run.disturbed or not run.ended:
        return 0, run.amount
    if run.status >= 400 or not run.status:
        return 0, 0
    if run.route in ("quote", "upload"):
        return run.amount, run.amount
    return None
