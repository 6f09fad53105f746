"""Paid requests before the handler runs: every refusal of the protocol, and its status."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.support import payments
from tests.support.payments import NOW, encode, seed
from tests.support.provider import Desk, Handler, Line, Shop, make_scope, selling, text
from x402mw.core import gate
from x402mw.core.errors import UnknownKey
from x402mw.provider import PaymentMiddleware, PerCall, PerUnit, Priced, request

pytestmark = pytest.mark.anyio

QUOTE, UPLOAD = "GET /quote/{symbol}", "POST /upload"
PRICES = {
    QUOTE: PerCall("0.001"),
    "GET /other/{symbol}": PerCall("0.001"),
    "POST /quote/{symbol}": PerCall("0.001"),
    UPLOAD: Priced(PerCall("0.002"), unbound_body=True, body_bytes_max=100),
    "POST /bound": Priced(PerCall("0.002"), body_bytes_max=100),
}


@pytest.fixture
async def shop(tmp_path):
    async with selling(Handler(), PRICES, tmp_path) as found:
        yield found


def runs(shop: Shop) -> int:
    found: Any = shop.middleware.app
    return found.runs


async def refused(shop: Shop, answer: Any, status: int, code: str, *, final: bool | None) -> None:
    """Checks a refusal: its status and code, its own seq in the header, and that nothing moved."""
    assert (answer.status, answer.problem["code"]) == (status, code)
    assert answer.header("cache-control") == "no-store"
    assert (answer.header("payment-required") is not None) is (status == 402)
    if final is None:
        assert answer.paid is None
    else:
        assert answer.paid["success"] is False
        assert answer.paid["extra"]["seq"] == "7"
        assert answer.paid["extra"]["state"] == "refused"
        assert answer.paid["extra"]["final"] is final
        assert answer.paid["errorReason"] == "invalid_batch_settlement_escrow_" + code
    assert runs(shop) == 0
    assert await shop.state(7) is None


async def test_a_payment_is_served_and_told(shop):
    """The happy path: the handler runs once, and the header tells charge and totals."""
    answer = await shop.pay(shop.payment())
    assert (answer.status, answer.body, runs(shop)) == (200, b"done", 1)
    assert answer.paid == {
        "success": True,
        "transaction": shop.payment().signed.commitment_id,
        "network": payments.NETWORK,
        "amount": "1000",
        "payer": payments.PAYER,
        "extra": {
            "seq": "7",
            "state": "settled",
            "final": True,
            "chargedTotal": "1000",
            "openTotal": "0",
        },
    }


async def test_two_payment_headers(shop):
    """Two payment headers are malformed, even if they are the same."""
    header = shop.header(shop.payment())
    answer = await shop.call("GET", "/quote/BTC", [header, header])
    await refused(shop, answer, 400, "payment_header", final=None)


@pytest.mark.parametrize(
    "value", [b"", b"x", b"e30=", b"\xff\xfe", b"A" * 5000, b"bnVsbA==", b"[]"]
)
async def test_malformed_headers(shop, value):
    """Too long, no base64, no JSON, no object: 400 before anything else."""
    answer = await shop.call("GET", "/quote/BTC", [(b"payment-signature", value)])
    await refused(shop, answer, 400, "malformed", final=None)


OTHER = replace(payments.QUOTE, pay_to="ag_" + "ff" * 16)
REFUSALS = {
    "signature": (402, "signature", True, {"key": seed("thief")}),
    "network": (402, "constants", True, {"network_id": bytes(32)}),
    "session": (402, "constants", True, {"session": bytes(16)}),
    "cover": (402, "cover", False, {"cumulative": 999}),
    "deposit": (402, "cover", False, {"cumulative": 1_000_001}),
    "expired": (402, "voucher_expires", True, {"expires": (NOW - 120) * 1000}),
    "too far": (402, "voucher_expires", False, {"expires": (NOW + 420) * 1000}),
    "path": (400, "request_binding", True, {"target": "/quote/ETH"}),
    "query": (400, "request_binding", True, {"target": "/quote/BTC?a=1"}),
    "body": (400, "request_binding", True, {"body": b"other"}),
    "origin": (400, "request_binding", True, {"origin": "https://evil.example"}),
    "method": (400, "request_binding", True, {"method": "HEAD"}),
    "binding": (400, "binding", True, {"binding": 1}),
    "terms only": (400, "binding", True, {"binding": 2}),
}


@pytest.mark.parametrize("name", list(REFUSALS))
async def test_refusals_of_a_payment(shop, name):
    """Each fault of a payment has its status and code; nothing runs and nothing is recorded."""
    status, code, final, changes = REFUSALS[name]
    header = shop.header(shop.payment(**changes))
    answer = await shop.call("GET", "/quote/BTC", [header])
    await refused(shop, answer, status, code, final=final)


async def test_terms_of_somebody_else(shop):
    """Terms that pay another account are refused as such."""
    answer = await shop.pay(shop.payment(terms=OTHER))
    await refused(shop, answer, 402, "constants", final=True)


@pytest.mark.parametrize(
    ("changes", "status", "code", "final"),
    [
        ({"exp": NOW}, 402, "token_expired", False),
        ({"pay_to": "ag_" + "ee" * 16}, 402, "constants", True),
        ({"journal": bytes(16)}, 402, "constants", True),
        ({"network": "escrow:other"}, 402, "token", False),
        ({"session_key": payments.RECEIPT_KEY}, 402, "signature", True),
    ],
)
async def test_refusals_of_a_token(shop, changes, status, code, final):
    """Each fault of a token has its status and code."""
    answer = await shop.pay(shop.payment(token=shop.token(**changes)))
    await refused(shop, answer, status, code, final=final)


@pytest.mark.parametrize(
    ("target", "method"), [("/other/BTC", "GET"), ("/quote/BTC", "POST"), ("/bound", "POST")]
)
async def test_a_voucher_moved_to_another_route(shop, target, method):
    """Terms of one route buy nothing on another, even if the request is signed for that one."""
    payment = shop.payment(target=target, method=method)
    await refused(shop, await shop.pay(payment), 402, "terms", final=False)


async def test_a_cheaper_price_of_ones_own_making(shop):
    """Terms nobody offered are refused, however well they hash."""
    cheap = replace(shop.payment().terms, amount=1)
    await refused(shop, await shop.pay(shop.payment(terms=cheap)), 402, "terms", final=False)


async def test_nothing_buys_nothing(shop):
    """The control terms, whose amount is 0, buy nothing off the control path."""
    control = shop.control({"op": "receipt"}).terms
    answer = await shop.pay(shop.payment(terms=control))
    await refused(shop, answer, 400, "amount", final=True)


async def test_causes_on_the_escrows_side_are_503(shop):
    """A wrong clock, an unknown key, a token that ran out while the escrow is away: 503."""
    shop.link.clock_off = True
    answer = await shop.pay(shop.payment())
    await refused(shop, answer, 503, "clock", final=False)
    assert answer.header("retry-after")
    shop.link.clock_off, shop.link.away = False, True
    answer = await shop.pay(shop.payment(token=shop.token(exp=NOW)))
    await refused(shop, answer, 503, "escrow_away", final=False)

    def unknown(token: str) -> Any:
        raise UnknownKey("a newer key")

    shop.link.open_token = unknown
    await refused(shop, await shop.pay(shop.payment()), 503, "unknown_key", final=False)


async def test_credit_is_bounded_while_the_escrow_is_away(tmp_path):
    """With the escrow away calls are served up to unredeemed_max, then 503; never 402."""
    desk = Desk(tmp_path / "j.db", unredeemed_max=2500)
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        shop.link.away = True
        statuses = [
            (await shop.pay(shop.payment(seq=seq, cumulative=1000 * seq))).status
            for seq in (1, 2, 3)
        ]
        assert statuses == [200, 200, 503]
        assert shop.redeemer.nudges > 0
        shop.link.away = False
        assert (await shop.pay(shop.payment(seq=3, cumulative=3000))).status == 200


async def test_credit_is_bounded_while_redeeming_fails(tmp_path):
    """An escrow that is there but redeems nothing is not given unbounded credit either."""
    desk = Desk(tmp_path / "j.db", unredeemed_max=2500)
    async with selling(Handler(), PRICES, tmp_path, desk=desk) as shop:
        shop.redeemer.failing = True
        statuses = [
            (await shop.pay(shop.payment(seq=seq, cumulative=1000 * seq))).status
            for seq in (1, 2, 3)
        ]
        assert statuses == [200, 200, 503]


async def test_failures_for_free_are_counted(tmp_path):
    """After its share of free failures a session is refused with 429 for the rest of a minute."""
    desk = Desk(tmp_path / "j.db", per_minute=3)
    async with selling(Handler(*text("no", 404)), PRICES, tmp_path, desk=desk) as shop:
        for seq in (1, 2, 3):
            assert (await shop.pay(shop.payment(seq=seq))).status == 404
        answer = await shop.pay(shop.payment())
        assert (answer.status, answer.header("retry-after")) == (429, "60")
        assert answer.paid["extra"]["state"] == "refused"
        assert await shop.state(7) is None
        shop.clock.now += 60
        assert (await shop.pay(shop.payment())).status == 404


async def test_a_corrective_402_shows_the_buyer_its_newest_voucher(shop):
    """Not covered, after the signature verified: the newest voucher and the totals come along."""
    await shop.pay(shop.payment(seq=1, cumulative=5000))
    newest = shop.payment(seq=1, cumulative=5000).signed.wire
    for seq in (2, 3, 4, 5):
        await shop.pay(shop.payment(seq=seq, cumulative=1))
    answer = await shop.pay(shop.payment(cumulative=1))
    assert answer.status == 402
    assert answer.paid["extra"]["voucher"] == newest
    assert answer.paid["extra"]["chargedTotal"] == "5000"
    thief = await shop.pay(shop.payment(cumulative=1, key=seed("thief")))
    assert "voucher" not in thief.paid["extra"]
    assert "chargedTotal" not in thief.paid["extra"]


async def test_a_binding_mismatch_tells_what_the_server_saw(shop):
    """400 request_binding says what was seen, so that the cause can be found."""
    answer = await shop.call("GET", "/quote/ETH?x=1", [shop.header(shop.payment())])
    assert answer.problem["saw"]["target"] == "/quote/ETH?x=1"
    assert answer.problem["saw"]["origin"] == "https://api.example.com"


# Bodies.


async def test_a_bound_body_reaches_the_handler_whole(tmp_path):
    """A bound body, however it is cut, is hashed, checked, and then given to the handler."""
    bodies = []

    async def read(scope, receive) -> None:
        bodies.append(await receive())

    async with selling(Handler(read, *text()), PRICES, tmp_path) as shop:
        payment = shop.payment("POST /bound", target="/bound", body=b"abcdef", cumulative=2000)
        answer = await shop.pay(payment, chunks=[b"ab", b"", b"cd", b"ef", b""])
        assert answer.status == 200
        assert [one["body"] for one in bodies] == [b"abcdef"]


@pytest.mark.parametrize("route", ["/upload", "/bound"])
async def test_a_long_body_is_refused_by_its_header(shop, route):
    """A Content-Length over the limit is 413 before a byte is read, bound or not."""
    payment = shop.payment(f"POST {route}", target=route, cumulative=2000)
    line = Line([])
    headers = [shop.header(payment), (b"content-length", b"101")]
    scope = make_scope("POST", route, headers)
    async with asyncio.timeout(5):
        await shop.app(scope, line.receive, line.send)
    await refused(shop, line.answer, 413, "body_too_large", final=False)


async def test_a_long_body_is_refused_as_it_comes(shop):
    """A chunked body over the limit is 413 as soon as it is over."""
    payment = shop.payment("POST /bound", target="/bound", cumulative=2000)
    answer = await shop.pay(payment, chunks=[b"x" * 60] * 1000)
    await refused(shop, answer, 413, "body_too_large", final=False)


async def test_a_slow_body_is_refused(shop, monkeypatch):
    """A body that does not come in time is 408."""
    monkeypatch.setattr(request, "BODY_SECONDS_MAX", 0.05)
    payment = shop.payment("POST /bound", target="/bound", cumulative=2000)
    line = Line([])
    headers = [(b"transfer-encoding", b"chunked"), shop.header(payment)]
    await shop.app(make_scope("POST", "/bound", headers), line.receive, line.send)
    await refused(shop, line.answer, 408, "body_timeout", final=False)


async def test_an_unbound_body_streams_to_the_handler(tmp_path):
    """With binding 1, where the route allows it, the handler reads the body as it comes."""
    parts = []

    async def read(scope, receive) -> None:
        more = True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]

    async with selling(Handler(read, *text()), PRICES, tmp_path) as shop:
        payment = shop.payment(UPLOAD, target="/upload", binding=1, cumulative=2000)
        answer = await shop.pay(payment, chunks=[b"any", b"thing"])
        assert (answer.status, parts) == (200, [b"any", b"thing"])


async def test_a_mounted_app_is_paid_under_its_prefix(tmp_path):
    """Behind a mount the buyer signs for the whole path, and controls under the prefix too."""
    desk = Desk(tmp_path / "j.db")
    inner = PaymentMiddleware(Handler(), provider=desk, prices=PRICES, path_prefix="/api")
    outer = Starlette(routes=[Mount("/api", inner)])
    async with selling(inner, PRICES, tmp_path, desk=desk, outer=outer) as shop:
        answer = await shop.pay(shop.payment(target="/api/quote/BTC?a=1"))
        assert (answer.status, answer.account) == (200, ("settled", "1000", "1000"))
        refused = await shop.pay(shop.payment(target="/quote/BTC", seq=8))
        assert refused.status == 404
        control = shop.control({"op": "receipt"}, seq=9)
        assert control.target == "/api/x402mw/control"
        assert (await shop.pay(control)).status == 200


# What the app sees, and what of its answer is passed on.


async def test_the_app_sees_no_payment_and_no_side_doors(tmp_path):
    """A paid request shows the app its meter, not the payment, nor ways around the charge."""
    doors = [f"http.response.{name}" for name in ("pathsend", "zerocopysend", "early_hint")]
    doors += ["http.response.trailers", "http.response.push", "http.response.debug"]
    handler = Handler()
    async with selling(handler, PRICES, tmp_path) as shop:
        extensions = {door: {} for door in doors}
        await shop.pay(shop.payment(), [(b"x-own", b"1")], extensions=extensions)
        (scope,) = handler.scopes
        assert scope["extensions"] == {"http.response.debug": {}}
        assert [name for name, _ in scope["headers"]] == [b"host", b"x-own"]
        assert scope["state"]["payment"].payer == payments.PAYER


async def test_headers_of_the_app_that_are_ours_are_dropped(tmp_path):
    """The app cannot write payment headers or let a shared cache keep a paid answer."""
    own = [
        (b"Payment-Response", b"forged"),
        (b"PAYMENT-REQUIRED", b"forged"),
        (b"cache-control", b"public, max-age=60, S-MaxAge=99"),
        (b"CDN-Cache-Control", b"max-age=60"),
        (b"Surrogate-Control", b"max-age=60"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
    ]
    start, end = text()
    start["headers"] += own
    async with selling(Handler(start, end), PRICES, tmp_path) as shop:
        answer = await shop.pay(shop.payment())
        assert answer.header("cache-control") == "max-age=60, private"
        assert answer.header("cdn-cache-control") is None
        assert answer.header("surrogate-control") is None
        assert answer.header("payment-required") is None
        assert answer.paid["extra"]["seq"] == "7"
        assert [value for name, value in answer.headers if name == b"set-cookie"] == [
            b"a=1",
            b"b=2",
        ]


async def test_terms_in_grace_are_served_unless_the_unit_changed(tmp_path):
    """Retired terms of a route hold for a while, but not if it now sells another unit."""
    prices = {"GET /quote/{symbol}": PerUnit("word", "0.001", max_units=10)}
    async with selling(Handler(), prices, tmp_path) as shop:
        now = shop.payment(cumulative=100_000).terms
        dearer = replace(now, unit_price=2000, amount=20_000)
        tokens = replace(now, unit="token")
        retired = {dearer.id: NOW - 10, tokens.id: NOW - 10}
        shop.service.book = replace(shop.service.book, retired=retired)
        assert (await shop.pay(shop.payment(terms=tokens, cumulative=100_000))).status == 402
        assert (await shop.pay(shop.payment(terms=dearer, cumulative=100_000))).status == 200
        shop.clock.now += gate.TERMS_GRACE_SECONDS
        old = shop.payment(terms=dearer, cumulative=100_000, seq=8)
        assert (await shop.pay(old)).status == 402


def test_the_header_is_read_in_one_form():
    """What tests send is what buyers send: compact JSON in base64."""
    assert encode({"a": 1}) == b"eyJhIjoxfQ=="
