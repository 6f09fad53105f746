"""Many calls at once on one session, and paid calls while somebody sends junk."""

import json
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import httpx

from bench import load
from bench.market import Account, Buyer, Market
from bench.processes import Process, free_port, running
from bench.serve import SETTINGS

PAID_PER_SECOND = 500
JUNK_PER_SECOND = 1000


def crowd(market: Market, account: Account, bare: Process, *, calls: int) -> dict[str, Any]:
    """So many connections to one provider, one session, all calls in flight together."""
    settings = market.provider(f"crowd-{calls}")
    port = free_port()
    environment = {SETTINGS: json.dumps(settings)}
    arguments = ("bench.serve", "ours-fsync", str(port))
    with running("crowd", market.folder, *arguments, port=port, settings=environment) as shop:
        buyer = Buyer(market, account, shop.url, sessions=1)
        requests = buyer.requests("/item", calls)
        httpx.get(f"{shop.url}/stalls")
        run = load.drive(shop.port, requests, connections=calls)
        stalls = httpx.get(f"{shop.url}/stalls").json()
        amount = int(buyer.offer("/item")["amount"])
        charged = _charged(Path(settings["journal"]))
        buyer.close()
    plain = f"GET /item HTTP/1.1\r\nhost: 127.0.0.1:{bare.port}\r\n\r\n".encode()
    httpx.get(f"{bare.url}/stalls")
    load.drive(bare.port, [plain] * calls, connections=calls)
    bare_stalls = httpx.get(f"{bare.url}/stalls").json()
    served = run.statuses["200"]
    return {
        "calls": calls,
        "served": served,
        "served_share": served / calls,
        "seconds": run.seconds,
        "charged": charged,
        "charge_exact": charged == served * amount,
        **stalls,
        **{f"bare_{name}": value for name, value in bare_stalls.items()},
        "p99_ms": run.percentile(0.99),
        "statuses": dict(run.statuses),
    }


def _charged(journal: Path) -> int:
    connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True)
    try:
        ((total,),) = connection.execute("SELECT sum(charged) FROM sessions").fetchall()
        return int(total)
    finally:
        connection.close()


def junk(shop: Process, buyer: Buyer, *, rounds: int, seconds: float) -> dict[str, Any]:
    """The latency of paid calls at a steady rate, alone and beside bad vouchers."""
    found: dict[str, list[load.Load]] = {"idle": [], "junk": []}
    bad = 0
    for _ in range(rounds):
        found["idle"].append(_paid(shop, buyer, seconds))
        sender = _Junk(
            shop.port, buyer.requests("/item", int(JUNK_PER_SECOND * seconds), spoil=True)
        )
        sender.start()
        found["junk"].append(_paid(shop, buyer, seconds))
        bad += sender.join()
    idle, beside = (_middle([run.percentile(0.99) for run in found[kind]]) for kind in found)
    return {
        "idle_p99_ms": idle,
        "junk_p99_ms": beside,
        "ratio": beside / idle,
        "refused_per_second": bad / (rounds * seconds),
        "paid_per_second": PAID_PER_SECOND,
    }


def _paid(shop: Process, buyer: Buyer, seconds: float) -> load.Load:
    requests = buyer.requests("/item", int(PAID_PER_SECOND * seconds))
    run = load.drive(shop.port, requests, rate=PAID_PER_SECOND)
    if run.statuses["200"] < len(requests):
        raise RuntimeError(f"paid calls were refused: {dict(run.statuses)}")
    return run


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


class _Junk:
    """A second load generator, in a process of its own."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_send_junk, args=(port, requests, theirs))

    def start(self) -> None:
        """Begins to send."""
        self._process.start()

    def join(self) -> int:
        """Waits for the end; returns how many were refused with 402."""
        refused: int = self._ours.recv()
        self._process.join()
        return refused


def _send_junk(port: int, requests: list[bytes], pipe: Any) -> None:
    run = load.drive(port, requests, connections=16, rate=JUNK_PER_SECOND)
    pipe.send(run.statuses["402"])
