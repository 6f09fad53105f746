"""Payments that no honest wallet sends, over real sockets to a real provider with a real escrow."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.support.escrow import Agent, MovingClock, RunningEscrow, running_escrow
from tests.support.handmade import Handmade, offer_of, open_handmade
from tests.support.serving import serving
from x402mw.core import headers, vouchers
from x402mw.core.keys import secret_key
from x402mw.provider import PaymentMiddleware, PerCall, PriceList, Provider
from x402mw_client.escrow import AsyncEscrowClient

pytestmark = [pytest.mark.anyio, pytest.mark.whole]

PRICES: PriceList = {
    "GET /item": PerCall("0.001"),
    "POST /item": PerCall("0.001"),
    "GET /dear": PerCall("0.002"),
}


class Till:
    """The app that is sold; it counts its own executions."""

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()

    async def sell(self, request: Request) -> JSONResponse:
        await asyncio.sleep(0)
        self.runs[str(request.url.path)] += 1
        return JSONResponse({"run": self.runs[str(request.url.path)]})

    def app(self, provider: Provider, prices: PriceList = PRICES) -> Starlette:
        app = Starlette(
            routes=[
                Route("/item", self.sell, methods=["GET", "POST"]),
                Route("/dear", self.sell),
            ]
        )
        app.add_middleware(PaymentMiddleware, provider=provider, prices=prices)
        return app


@dataclass
class Stage:
    """A provider on a socket, its till, and a buyer with an open session there."""

    escrow: RunningEscrow
    clock: MovingClock
    seller: Agent
    buyer: Agent
    till: Till
    shop: str
    http: httpx.AsyncClient
    first: Handmade

    def payment(self, **changes: object) -> Handmade:
        """A fresh, right payment for `GET /item`."""
        fresh = replace(self.first, seq=self.first.seq + next(_numbers), cumulative=1_000_000)
        return replace(fresh, **changes)

    async def charged(self) -> int:
        """What the provider says the session was charged so far."""
        answer = await self.first.control(op="receipt").send(self.http)
        assert answer.status_code == 200, answer.text
        assert answer.json()["open"] == "0"
        return int(answer.json()["charged"])


_numbers = itertools.count(1_000)


def make_provider(
    escrow: RunningEscrow, seller: Agent, journal: Path, clock: MovingClock
) -> Provider:
    return Provider(escrow=escrow.url, api_key=seller.api_key, journal=str(journal), clock=clock)


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    clock, till = MovingClock(), Till()
    limits = httpx.Limits(max_connections=50)
    async with (
        running_escrow(tmp_path, clock) as escrow,
        httpx.AsyncClient(timeout=60, limits=limits) as http,
    ):
        seller, buyer = await escrow.new_agent("s"), await escrow.new_agent("b", balance="20.00")
        provider = make_provider(escrow, seller, tmp_path / "journal.db", clock)
        async with serving(till.app(provider)) as shop:
            first = await open_handmade(http, escrow, buyer, shop, clock)
            yield Stage(escrow, clock, seller, buyer, till, shop, http, first)


async def test_the_same_header_a_thousand_times_at_once(tmp_path: Path) -> None:
    """One run, one charge; every other answer is the stored outcome or 409, never 402."""
    async with stage(tmp_path) as s:
        payment = s.payment()
        header = payment.header()
        answers = await asyncio.gather(*(payment.send(s.http, header=header) for _ in range(1000)))
        statuses = Counter(answer.status_code for answer in answers)
        assert statuses.keys() <= {200, 409}
        assert {answer.text for answer in answers if answer.status_code == 200} == {'{"run":1}'}
        assert s.till.runs["/item"] == 1
        assert await s.charged() == 1000


async def test_every_form_of_one_request_in_every_order_and_twice(tmp_path: Path) -> None:
    """However the signed forms of one logical request arrive, it runs once and is charged once."""
    async with stage(tmp_path) as s:
        rounds = 0
        for order in itertools.permutations(range(3)):
            base = s.payment()
            later = replace(base, expires=base.expires + 1000)
            forms = [base, later, replace(base, cumulative=1_500_000)]
            for number in (*order, *reversed(order)):
                answer = await forms[number].send(s.http)
                assert answer.status_code in (200, 409)
            rounds += 1
            assert s.till.runs["/item"] == rounds
        assert await s.charged() == rounds * 1000


async def test_forms_of_one_request_racing(tmp_path: Path) -> None:
    """Different vouchers of one seq, sent at the same moment: one of them is admitted."""
    async with stage(tmp_path) as s:
        base = s.payment()
        forms = [replace(base, cumulative=1_000_000 + 1000 * number) for number in range(20)]
        answers = await asyncio.gather(*(form.send(s.http) for form in forms))
        assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 19}
        assert s.till.runs["/item"] == 1


@pytest.mark.parametrize("settled", [False, True], ids=["fresh seq", "settled seq"])
async def test_a_payment_moved_to_another_request(tmp_path: Path, settled: bool) -> None:
    """A voucher is good for its own route, query, method, body and price, and for nothing else."""
    async with stage(tmp_path) as s:
        payment = s.payment()
        if settled:
            assert (await payment.send(s.http)).status_code == 200
        runs = s.till.runs.total()
        dear = await offer_of(s.http, "GET", f"{s.shop}/dear")
        cheaper = {**dear, "amount": "1000"}
        header = payment.header()
        moved = [
            await payment.send(s.http, path="/dear"),
            await payment.send(s.http, path="/item?more=1"),
            await payment.send(s.http, method="POST"),
            await payment.send(s.http, method="HEAD"),
            await payment.send(s.http, method="POST", body=b"other"),
            await payment.send(s.http, body=b"other", method="GET"),
            await payment.send(
                s.http, path="/dear", header=replace(payment, accepts=dear).header()
            ),
            await s.http.get(
                f"{s.shop}/dear", headers={"PAYMENT-SIGNATURE": forge(payment, cheaper)}
            ),
            await payment.send(s.http, shop=s.shop.replace("127.0.0.1", "localhost")),
            await payment.send(s.http, header=payment.header(expires=payment.expires + 1)),
            await payment.send(s.http, header=payment.header(binding=1)),
        ]
        assert header == payment.header()
        assert all(400 <= answer.status_code < 500 for answer in moved)
        assert s.till.runs.total() == runs
        assert await s.charged() == runs * 1000


def forge(payment: Handmade, accepts: dict[str, object]) -> str:
    """The right voucher beside other terms than it was signed for."""
    return replace(payment, accepts=accepts).header(signed=payment.signed)


def other_network(payment: Handmade) -> bytes:
    """The voucher, signed for another network."""
    moved = vouchers.split_voucher(payment.signed).voucher
    signed = vouchers.sign_voucher(moved._replace(network=bytes(32)), secret_key(payment.seed))
    return signed.raw + signed.signature


@pytest.mark.parametrize("settled", [False, True], ids=["fresh seq", "settled seq"])
async def test_a_voucher_of_another_session_or_key(tmp_path: Path, settled: bool) -> None:
    """A voucher is good in its own session only, under that session's key and network only."""
    async with stage(tmp_path) as s:
        payment = s.payment()
        if settled:
            assert (await payment.send(s.http)).status_code == 200
        runs = s.till.runs.total()
        other = await open_handmade(s.http, s.escrow, s.buyer, s.shop, s.clock)
        strangers = [
            payment.header(token=other.token),
            replace(payment, session=other.session).header(),
            replace(payment, session=other.session, token=other.token).header(payment.signed),
            replace(payment, seed=bytes(32)).header(),
            payment.header(other_network(payment)),
            payment.header(token=payment.token[:-8] + "AAAAAAAA"),
        ]
        for header in strangers:
            answer = await payment.send(s.http, header=header)
            assert answer.status_code in (400, 402), answer.text
        assert s.till.runs.total() == runs


async def test_a_voucher_at_another_provider(tmp_path: Path) -> None:
    """A payment for one provider or journal buys nothing from another, settled or not."""
    async with stage(tmp_path) as s:
        stranger = await s.escrow.new_agent("stranger")
        twin = make_provider(s.escrow, s.seller, tmp_path / "twin.db", s.clock)
        other = make_provider(s.escrow, stranger, tmp_path / "other.db", s.clock)
        till = Till()
        async with serving(till.app(twin)) as twin_shop, serving(till.app(other)) as other_shop:
            fresh, settled = s.payment(), s.payment()
            assert (await settled.send(s.http)).status_code == 200
            for payment, shop in itertools.product((fresh, settled), (twin_shop, other_shop)):
                answer = await payment.send(s.http, shop=shop)
                assert answer.status_code == 402
        assert till.runs.total() == 0


async def test_every_flipped_byte_of_a_voucher(tmp_path: Path) -> None:
    """No byte of the voucher or its signature may differ, also when its seq is settled."""
    async with stage(tmp_path) as s:
        payment = s.payment()
        assert (await payment.send(s.http)).status_code == 200
        signed = payment.signed
        for place in range(len(signed)):
            flipped = bytearray(signed)
            flipped[place] ^= 1 << place % 8
            answer = await payment.send(s.http, header=payment.header(bytes(flipped)))
            assert answer.status_code in (400, 402), place
        assert s.till.runs["/item"] == 1


async def test_a_late_identical_retry_gets_its_outcome(tmp_path: Path) -> None:
    """Token and voucher expired, session closing, terms changed: still the outcome, never 402."""
    async with stage(tmp_path) as s:
        payment = s.payment()
        assert (await payment.send(s.http)).json() == {"run": 1}
        await s.escrow.pass_time(700)
        late = await payment.send(s.http)
        assert (late.status_code, late.headers["idempotent-replayed"]) == (200, "true")
        # A new call finds its token expired; or the escrow away, until the next contact with it.
        assert (await s.payment().send(s.http)).status_code in (402, 503)
        await s.first.control(op="close").send(s.http)
        closing = await payment.send(s.http)
        assert (closing.status_code, closing.json()) == (200, {"run": 1})
        assert s.till.runs["/item"] == 1


async def test_a_late_retry_after_a_price_change(tmp_path: Path) -> None:
    """After a restart with another price the settled call still answers; a new one pays anew."""
    clock, till = MovingClock(), Till()
    async with running_escrow(tmp_path, clock) as escrow, httpx.AsyncClient() as http:
        seller, buyer = await escrow.new_agent("s"), await escrow.new_agent("b", balance="20.00")
        journal = tmp_path / "journal.db"
        app = till.app(make_provider(escrow, seller, journal, clock))
        async with serving(app) as shop:
            port = int(shop.rpartition(":")[2])
            first = await open_handmade(http, escrow, buyer, shop, clock)
            assert (await first.send(http)).status_code == 200
        dearer = PRICES | {"GET /item": PerCall("0.003")}
        app = till.app(make_provider(escrow, seller, journal, clock), dearer)
        async with serving(app, port=port) as shop:
            assert shop == first.shop
            again = await first.send(http)
            assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true")
            in_grace = replace(first, seq=first.seq + 10_000)
            assert (await in_grace.send(http)).status_code == 200
            await escrow.pass_time(301)
            refused = await replace(first, seq=first.seq + 20_000).send(http)
            assert refused.status_code == 402
            assert refused.json()["code"] == "terms"
            assert headers.PAYMENT_REQUIRED in refused.headers
            assert (await first.send(http)).status_code == 200


async def test_a_close_leaves_nothing_behind(tmp_path: Path) -> None:
    """Close redeems what is owed, sends the rest home at once, and the token buys nothing more."""
    async with stage(tmp_path) as s:
        for _ in range(3):
            assert (await s.payment().send(s.http)).status_code == 200
        answer = await s.first.control(op="close").send(s.http)
        assert (answer.status_code, answer.json()["charged"]) == (200, "3000")
        client = AsyncEscrowClient(s.escrow.url, s.buyer.api_key)
        try:
            record = await client.status(s.first.session)
        finally:
            await client.aclose()
        assert (record.status, record.released, record.refunded) == ("settled", 3000, 1_997_000)
        assert (await s.payment().send(s.http)).status_code == 402
        assert s.till.runs["/item"] == 3
