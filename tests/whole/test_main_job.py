"""The main job with real parties on real sockets: escrow and shop processes, and this buyer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo_provider.lossy import LossyRelay
from tests.support.market import Market, open_market
from x402mw.core.amounts import to_atomic
from x402mw.core.errors import LimitExceeded
from x402mw_client import Limits, PaymentTransport, SyncPaymentTransport, Wallet

pytestmark = [pytest.mark.anyio, pytest.mark.whole]


class Counting(httpx.AsyncBaseTransport):
    """Counts what really goes to the provider."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=100))
        self.round_trips = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.round_trips += 1
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with open_market(tmp_path_factory.mktemp("market")) as opened:
        # A first request may be slow; a buyer that waits for one over a second asks for itself.
        httpx.get(f"{opened.shop.url}/item/warm")
        yield opened


def wallet_for(market: Market, **changes: object) -> Wallet:
    settings = {
        "escrow": market.escrow.url,
        "api_key": market.buyer.api_key,
        "limits": Limits(per_request="0.10", total="10.00"),
        "deposit": "1.00",
    }
    return Wallet(**(settings | changes))


async def test_hundred_at_once_on_a_fresh_session(market: Market) -> None:
    """A hundred parallel calls on one fresh session all pass, for one extra round trip in all."""
    wallet, counting = wallet_for(market), Counting()
    async with httpx.AsyncClient(transport=PaymentTransport(wallet, inner=counting)) as http:
        urls = [f"{market.shop.url}/item/a{number}" for number in range(100)]
        answers = await asyncio.gather(*(http.get(url) for url in urls))
        assert [answer.status_code for answer in answers] == [200] * 100
        assert wallet.spent == 100 * 1000
        assert counting.round_trips <= 101
        ran = market.shop.executions()
        assert all(ran[f"a{number}"] == 1 for number in range(100))


async def test_a_metered_call_costs_what_it_used(market: Market) -> None:
    """The charge follows what the handler counted, far below the maximum that was signed."""
    wallet = wallet_for(market)
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
        answer = await http.post(f"{market.shop.url}/words", content="word " * 500)
        assert answer.json() == {"words": 500}
        assert wallet.spent == 1000


async def test_a_stream_costs_what_it_gave(market: Market) -> None:
    """A streamed answer's charge is known right after its last byte, or after it was cut short."""
    wallet = wallet_for(market)
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
        answer = await http.get(f"{market.shop.url}/stream/300")
        assert answer.extensions["x402mw_payment"].charge == wallet.spent == 300 * 100
        async with http.stream("GET", f"{market.shop.url}/stream/900") as cut:
            await anext(cut.aiter_lines())
        assert 300 * 100 < wallet.spent <= 1200 * 100


async def test_asking_for_each_stream_is_not_asking_too_much(market: Market) -> None:
    """However many streams a session pays for in a minute, each figure is learnt at once."""
    wallet = wallet_for(market)
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
        for number in range(80):
            answer = await http.get(f"{market.shop.url}/stream/2")
            assert answer.extensions["x402mw_payment"].charge == 200, number
        assert wallet.spent == 80 * 200


async def test_a_failing_handler_costs_nothing(market: Market) -> None:
    """A handler that raises answers 500, and the buyer pays nothing."""
    wallet = wallet_for(market)
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
        answer = await http.get(f"{market.shop.url}/broken")
        assert answer.status_code == 500
        assert wallet.spent == 0


async def test_a_lost_answer_is_not_paid_twice(market: Market) -> None:
    """When the provider's 200 is lost the retry gets the stored outcome: one run, one charge."""
    wallet = wallet_for(market)
    async with LossyRelay(market.shop.port) as relay:
        origin = f"http://127.0.0.1:{relay.port}"
        async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
            await http.get(f"{origin}/item/first")
            relay.lose_next()
            answer = await http.get(f"{origin}/item/lost")
            assert answer.status_code == 200
            assert answer.headers["idempotent-replayed"] == "true"
            assert relay.lost == 1
            assert wallet.spent == 2 * 1000
            assert market.shop.executions()["lost"] == 1


async def test_limits_refuse_before_anything_is_signed(market: Market) -> None:
    """A call over a limit is refused by name; nothing is locked and nothing runs."""
    wallet = wallet_for(market, limits=Limits(per_request="0.0005", total="1.00"))
    before = market.balance(market.buyer)
    async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
        with pytest.raises(LimitExceeded) as refused:
            await http.get(f"{market.shop.url}/item/toodear")
    assert refused.value.limit == "per_request"
    assert market.balance(market.buyer) == before
    assert market.shop.executions()["toodear"] == 0


def test_the_sync_client_does_the_same(market: Market) -> None:
    """`SyncPaymentTransport` pays, pays ahead, and closes, like the async one."""
    wallet = wallet_for(market)
    with httpx.Client(transport=SyncPaymentTransport(wallet)) as http:
        answers = [http.get(f"{market.shop.url}/item/s{number}") for number in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert wallet.spent == 5 * 1000


async def test_the_books_balance_after_closing(tmp_path: Path) -> None:
    """After close: locked = paid + fee + refunded to the unit, and the escrow proves its books."""
    with open_market(tmp_path, funds="3.00") as market:
        wallet = wallet_for(market)
        async with httpx.AsyncClient(transport=PaymentTransport(wallet)) as http:
            for number in range(7):
                await http.get(f"{market.shop.url}/item/b{number}")
            await http.post(f"{market.shop.url}/words", content="word " * 333)
        [session] = market.sessions()
        charged = 7 * 1000 + 666
        assert wallet.spent == charged
        assert session["status"] == "settled"
        assert to_atomic(session["released"]) == charged
        fee = charged // 100
        assert to_atomic(session["fee"]) == fee
        assert to_atomic(market.balance(market.seller)) == charged - fee
        assert to_atomic(market.balance(market.buyer)) == 3_000_000 - charged
        market.escrow.check()
