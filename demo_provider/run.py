"""`x402mw demo`: an escrow, a provider and a buyer, for real, and the books at the end.

Escrow and provider are processes of their own; the buyer is this one. Every step is an ordinary
call through `PaymentTransport`, and what it must prove is checked: the demo ends with status 0 only
if every step did what it says and the books balance to the unit.
"""

import asyncio
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from demo_provider import processes
from demo_provider.lossy import LossyRelay
from demo_provider.texts import ARTICLE, STORY
from x402mw.core.amounts import display, to_atomic
from x402mw.core.errors import LimitExceeded
from x402mw_client import Limits, PaymentTransport, Wallet
from x402mw_client.escrow import AsyncEscrowClient

PARALLEL_CALLS = 100
FUNDS = "5.00"


class CountingTransport(httpx.AsyncBaseTransport):
    """Counts the round trips that really go to the provider."""

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=PARALLEL_CALLS))
        self.round_trips = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Passes one request on."""
        self.round_trips += 1
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._inner.aclose()


@dataclass(slots=True)
class Row:
    """One line of the table: what a step bought, and what it took."""

    step: str
    calls: int
    round_trips: int
    milliseconds: float
    cost: int
    remark: str


@dataclass(slots=True)
class Market:
    """The running parties and the buyer's side of them."""

    folder: Path
    escrow: processes.Party
    provider: processes.Party
    escrow_url: str
    provider_url: str
    api_key: str
    buyer: AsyncEscrowClient
    seller: AsyncEscrowClient
    wallet: Wallet
    counter: CountingTransport
    http: httpx.AsyncClient
    relay: LossyRelay
    rows: list[Row] = field(default_factory=list)

    async def step(self, name: str, calls: int, work: Awaitable[str]) -> None:
        """Runs one step and writes down what it cost."""
        trips, spent, began = self.counter.round_trips, self.wallet.spent, time.perf_counter()
        remark = await work
        took = (time.perf_counter() - began) * 1000
        self.rows.append(
            Row(
                step=name,
                calls=calls,
                round_trips=self.counter.round_trips - trips,
                milliseconds=took / calls,
                cost=self.wallet.spent - spent,
                remark=remark,
            )
        )


def require(condition: object, message: str) -> None:
    """Stops the demo when a step did not do what it says."""
    if not condition:
        raise RuntimeError(f"the demo found: {message}")


# The steps. Each returns a remark for the table.


async def first_call(market: Market) -> str:
    """Learns the terms, opens a session, pays."""
    answer = await market.http.get(f"{market.provider_url}/quote/BTC")
    require(answer.status_code == 200, f"a quote answered {answer.status_code}")
    return "402, then paid"


async def next_calls(market: Market) -> str:
    """Pays ahead: one round trip each."""
    for symbol in ("ETH", "SOL", "XMR", "DOGE", "LTC"):
        answer = await market.http.get(f"{market.provider_url}/quote/{symbol}")
        require(answer.status_code == 200, f"a quote answered {answer.status_code}")
    return "paid ahead"


async def metered_call(market: Market) -> str:
    """Pays for what was used, which is less than what was signed."""
    spent = market.wallet.spent
    answer = await market.http.post(f"{market.provider_url}/summarize", content=ARTICLE)
    tokens = answer.json()["tokens"]
    cost = market.wallet.spent - spent
    require(cost == tokens * 2000 // 1000, f"{tokens} tokens cost {cost} units")
    return f"used {tokens} tokens of 4000"


async def streamed_call(market: Market) -> str:
    """Takes a stream chunk by chunk, and pays for the words that came."""
    arrivals = []
    words = ""
    async with market.http.stream("GET", f"{market.provider_url}/story") as answer:
        async for chunk in answer.aiter_text():
            arrivals.append(time.perf_counter())
            words += chunk
    spread = (arrivals[-1] - arrivals[0]) * 1000
    require(words.split() == STORY.split(), "the story came incomplete")
    require(len(arrivals) > 5 and spread > 50, "the story came in one piece")
    return f"{len(STORY.split())} words over {spread:.0f} ms"


async def parallel_calls(market: Market) -> str:
    """Buys a hundred at once on one session."""
    urls = [f"{market.provider_url}/quote/S{number}" for number in range(PARALLEL_CALLS)]
    answers = await asyncio.gather(*(market.http.get(url) for url in urls))
    served = sum(answer.status_code == 200 for answer in answers)
    require(served == PARALLEL_CALLS, f"only {served} of {PARALLEL_CALLS} were served")
    return "all on one session"


async def failing_call(market: Market) -> str:
    """Meets a handler that fails, and pays nothing."""
    spent = market.wallet.spent
    answer = await market.http.get(f"{market.provider_url}/fortune")
    require(answer.status_code == 500, f"the failing handler answered {answer.status_code}")
    require(market.wallet.spent == spent, "a failed call was charged")
    return "500, nothing charged"


async def lost_answer(market: Market) -> str:
    """Loses the provider's answer on the way; the retry gets it, and nothing is paid twice."""
    spent = market.wallet.spent
    origin = f"http://127.0.0.1:{market.relay.port}"
    await market.http.get(f"{origin}/quote/FIRST")
    market.relay.lose_next()
    answer = await market.http.get(f"{origin}/quote/LOST")
    require(answer.status_code == 200 and market.relay.lost == 1, "no answer was lost")
    require(answer.headers.get("idempotent-replayed") == "true", "the call ran twice")
    require(market.wallet.spent - spent == 2000, "a lost answer was paid twice")
    return "sent again, paid once"


async def refused_call(market: Market) -> str:
    """Wants more than the wallet allows, and is refused before anything is signed."""
    trips = market.counter.round_trips
    tight = Wallet(
        escrow=market.escrow_url,
        api_key=market.api_key,
        limits=Limits(per_request="0.0005", total="1.00"),
    )
    transport = PaymentTransport(tight, inner=market.counter)
    try:
        await httpx.AsyncClient(transport=transport).get(f"{market.provider_url}/quote/BTC")
    except LimitExceeded as error:
        require(market.counter.round_trips - trips == 1, "a refused call was sent")
        return f"refused: {error.limit}"
    finally:
        await tight.aclose()
    raise RuntimeError("the demo found: the limit did not hold")


STEPS: list[tuple[str, int, Callable[[Market], Awaitable[str]]]] = [
    ("first call", 1, first_call),
    ("next calls", 5, next_calls),
    ("metered call", 1, metered_call),
    ("streamed call", 1, streamed_call),
    (f"{PARALLEL_CALLS} at once", PARALLEL_CALLS, parallel_calls),
    ("failing handler", 1, failing_call),
    ("lost answer", 2, lost_answer),
    ("over the limit", 1, refused_call),
]


# Before and after.


async def open_market(folder: Path) -> Market:
    """Starts both servers, registers both parties, and funds the buyer."""
    escrow = await processes.start(
        "escrow", folder, "x402mw.cli", "escrow", "serve", "--port", "0", "--db", "escrow.db"
    )
    escrow_url = (await escrow.wait_for(r"X402MW_ESCROW=(\S+)"))[1]
    async with httpx.AsyncClient(base_url=escrow_url) as http:
        buyer_account = (await http.post("/api/v1/agents", json={"name": "demo buyer"})).json()
    printed = await processes.run(
        folder, "x402mw.cli", "register", "--escrow", escrow_url, "demo provider"
    )
    settings = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    port = free_port()
    settings |= {"X402MW_ORIGINS": f"http://127.0.0.1:{port}", "X402MW_JOURNAL": "journal.db"}
    provider = await processes.start(
        "provider", folder, "uvicorn", "demo_provider.app:app", "--port", str(port),
        "--no-access-log", settings=settings,
    )  # fmt: skip
    await provider.wait_for(r"Uvicorn running on")
    buyer = AsyncEscrowClient(escrow_url, buyer_account["api_key"])
    await buyer.claim_faucet()
    await processes.run(
        folder, "x402mw.cli", "escrow", "deposit", "--db", "escrow.db",
        buyer_account["agent_id"], FUNDS,
    )  # fmt: skip
    wallet = Wallet(
        escrow=escrow_url,
        api_key=buyer_account["api_key"],
        limits=Limits(per_request="0.10", total="4.00"),
        deposit="2.00",
    )
    counter = CountingTransport()
    return Market(
        folder=folder,
        escrow=escrow,
        provider=provider,
        escrow_url=escrow_url,
        provider_url=f"http://127.0.0.1:{port}",
        api_key=buyer_account["api_key"],
        buyer=buyer,
        seller=AsyncEscrowClient(escrow_url, settings["X402MW_API_KEY"]),
        wallet=wallet,
        counter=counter,
        http=httpx.AsyncClient(transport=PaymentTransport(wallet, inner=counter), timeout=30),
        relay=await LossyRelay(port).open(),
    )


def free_port() -> int:
    """A port of this machine that nobody listens on right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Books:
    """What the escrow says at the end, in atomic units."""

    locked: int
    paid: int
    fee: int
    refunded: int
    charged: int
    proof: str

    @property
    def balance(self) -> bool:
        """Whether nothing was made or lost."""
        return self.locked == self.paid + self.fee + self.refunded


async def close_books(market: Market) -> Books:
    """Closes every session at the provider, which redeems, and reads the escrow's books."""
    before = await market.seller.me()
    await market.wallet.aclose()
    sessions = (await market.buyer.list_escrows(role="buyer")).items
    unfinished = [one for one in sessions if one.remaining]
    require(not unfinished, f"{len(unfinished)} sessions still hold money")
    after = await market.seller.me()
    spent = to_atomic(FUNDS) + to_atomic("1.00") - (await market.buyer.me()).balance
    books = Books(
        locked=sum(one.deposit for one in sessions),
        paid=after.balance - before.balance,
        fee=sum(one.fee for one in sessions),
        refunded=sum(one.refunded for one in sessions),
        charged=market.wallet.spent,
        proof=await processes.run(
            market.folder, "x402mw.cli", "escrow", "check", "--db", "escrow.db"
        ),
    )
    require(books.balance, f"the books do not balance: {books}")
    require(books.charged == books.paid + books.fee == spent, f"wallet and escrow differ: {books}")
    return books


async def play(console: Console, *, keep: bool) -> None:
    """Plays the whole demo."""
    with tempfile.TemporaryDirectory(prefix="x402mw-demo-") as name:
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("starting escrow and provider", total=len(STEPS) + 2)
            market = await open_market(Path(name))
            try:
                for title, calls, work in STEPS:
                    progress.update(task, advance=1, description=title)
                    await market.step(title, calls, work(market))
                progress.update(task, advance=1, description="closing, redeeming")
                books = await close_books(market)
                progress.update(task, advance=1, description="done")
            except BaseException:
                for party in (market.escrow, market.provider):
                    console.print(f"[red]{party.name}:[/red]", party.output()[-2000:], markup=False)
                await stop(market)
                raise
        console.print(steps_table(market), books_table(books))
        console.print(books.proof.strip())
        try:
            if keep:
                await stay(console, market)
        finally:
            await stop(market)


def steps_table(market: Market) -> Table:
    """What each step bought."""
    table = Table(
        title="What the buyer did", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("step", no_wrap=True)
    for heading in ("calls", "trips", "ms each", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in market.rows:
        cells = (str(row.calls), str(row.round_trips), f"{row.milliseconds:.1f}")
        table.add_row(row.step, *cells, display(row.cost), row.remark)
    return table


def books_table(books: Books) -> Table:
    """The end of the story: locked = paid + fee + refunded."""
    table = Table(title="The books (USDC)", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("locked", "= paid", "+ fee", "+ refunded", "the wallet says charged"):
        table.add_column(heading, justify="right", no_wrap=True)
    amounts = (books.locked, books.paid, books.fee, books.refunded, books.charged)
    table.add_row(*(display(amount) for amount in amounts))
    return table


async def stay(console: Console, market: Market) -> None:
    """Leaves everything running until Ctrl-C or SIGTERM, and says how to go on."""
    settings = f"X402MW_ESCROW={market.escrow_url} X402MW_API_KEY={market.api_key}"
    quote, python = f"{market.provider_url}/quote/BTC", sys.executable
    books = f"{market.folder}/escrow.db"
    console.print(
        f"\nStill running: escrow {market.escrow_url}, provider {market.provider_url}\n\n"
        f"  see the terms    curl -i {quote}\n"
        f"  buy              {settings} {python} -m demo_provider.buyer {quote}\n"
        f"  read the books   {python} -m x402mw.cli escrow check --db {books}\n\n"
        "Ctrl-C stops everything.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await stopped.wait()


async def stop(market: Market) -> None:
    """Stops everything that was started."""
    await market.http.aclose()
    await asyncio.gather(market.buyer.aclose(), market.seller.aclose(), market.relay.aclose())
    await asyncio.gather(market.provider.stop(), market.escrow.stop())


def main(*, keep: bool = False) -> int:
    """Plays the demo; returns the exit status, 0 only if everything held."""
    console = Console()
    try:
        asyncio.run(play(console, keep=keep))
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    return 0
