"""Junk in every field: a clear problem with a 4xx status, never a 5xx, and nothing changed."""

import json
import re
from decimal import Decimal
from itertools import product
from typing import Any

import anyio
import pytest

from tests.escrow.market import JOURNAL, SESSION_KEY, Market, code_of, market
from tests.escrow.operators import make_key
from tests.escrow.test_accounts_scopes import IDS, filled
from x402mw.escrow.access import SCOPES
from x402mw.escrow.agents import claim_source
from x402mw.escrow.app import ROUTES

pytestmark = pytest.mark.anyio

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**63, 10**400, 1.5, [], {}, [[]], {"a": 1}, "", " ", "0", "-1",
    "1e400", "1e-400", "NaN", "Infinity", "-0.0", "+", "1_000", "\u0661", "0x10", "1,5", "1" * 50,
    "1." + "0" * 45, "9223372036854.775808", "\x00", "a\nb", "\u202e", "é", "x" * 2000, "esc_",
    "ag_" + "G" * 32, "jr_" + "A" * 32, "../../etc/passwd", "' OR 1=1 --", "A" * 43, "=" * 43,
    "AQ" + "A" * 41, "A" * 235, "A" * 236,
]  # fmt: skip

MEANINGFUL = {
    *(("release", "cumulative", text) for text in ("'0'", "'-0.0'", "0", "1", "1.5")),
    *(("topup", "amount", text) for text in ("1", "1.5")),
    ("redeem", "items", "[]"),
}
"""(path, field, value) that are no junk: JSON numbers are amounts too (M3)."""

RAW_BODIES = [
    b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"name":"a","name":"b"}', b'{"name":NaN}',
    b'{"name":"\\ud800"}', b'{"name":' + b"[" * 2000 + b"]" * 2000 + b"}", b"{}" * 2,
    b'{"name": 1' + b"0" * 5000 + b"}", b"\x00", b'{"name":"x"}\x00',
]  # fmt: skip

PATHS = [
    "/nope", "/escrow/", "/escrow/x", "/escrow/esc_%00", "/escrow/" + "e" * 5000, "//escrow",
    "/escrow/esc_" + "F" * 32, "/escrow/%2e%2e", "/agents/me/",
]  # fmt: skip

QUERIES = [
    *("/escrow?limit=-1", "/escrow?limit=x", "/escrow?limit=501", "/escrow?limit=1e3"),
    *("/escrow?after=x", f"/escrow?after={2**63}", "/escrow?role=owner", "/escrow?status=gone"),
    *("/escrow?limit=%00", "/escrow?role=", "/escrow?after=1.0", "/escrow?limit=\u0663"),
    *("/changes", "/changes?journal=x", f"/changes?journal={JOURNAL}&since=-1"),
    f"/changes?journal={JOURNAL}&serial={2**63}",
]

AUTHORIZATIONS = [
    "", "Bearer", "Bearer pf_live_", "Basic x", "Bearer \xe9", "Bearer " + "x" * 5000,
]  # fmt: skip


async def snapshot(m: Market) -> tuple[Any, ...]:
    """What junk must not change."""
    return (
        await m.balance(m.buyer),
        await m.balance(m.provider),
        (await m.get(m.buyer, "/escrow")).json(),
    )


async def test_junk_in_any_field_of_any_body(db: str) -> None:
    """Contract: every field of every body refuses every kind of junk with 4xx."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        bodies: list[tuple[Any, str, dict[str, Any]]] = [
            (m.buyer, "/escrow", m.wish(expires_in_seconds=3600)),
            (m.buyer, f"/escrow/{name}/topup", {"amount": "1000"}),
            (m.buyer, f"/escrow/{name}/release", {"cumulative": "x"}),
            (m.provider, f"/escrow/{name}/close", {"voucher": "x", "amount": "1"}),
            (m.provider, "/redeem", {"journal": JOURNAL, "serial": 1, "items": [1]}),
        ]
        before = await snapshot(m)
        for agent, path, body in bodies:
            for field in [*body, "unknown"]:
                for value in VALUES:
                    if (path.rpartition("/")[2], field, repr(value)) in MEANINGFUL:
                        continue
                    answer = await m.http.post(
                        path, content=json_of({**body, field: value}), headers=agent.headers
                    )
                    assert code_of(answer)[0] in (400, 404, 422), (path, field, value)
        assert await snapshot(m) == before


def json_of(value: Any) -> bytes:
    """JSON as a stranger may write it: with any text in it."""
    return json.dumps(value).encode()


async def test_junk_in_items_never_blocks_the_others(db: str) -> None:
    """Rule 4: an item that cannot count gets its own verdict; malformed shapes refuse the batch."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        junk = [{"voucher": text, "amount": "1"} for text in VALUES if isinstance(text, str)]
        junk = [item for item in junk if len(item["voucher"]) <= 1024]
        good = {"voucher": m.voucher(name, "1"), "amount": "1"}
        verdicts = await m.redeem(*junk, good, *junk)
        assert [index for index, item in enumerate(verdicts) if item["ok"]] == [len(junk)]
        assert {item["code"] for item in verdicts if not item["ok"]} == {"malformed"}


async def test_amounts_that_are_too_much_together(db: str) -> None:
    """M1: two amounts whose sum no account could hold are a wrong request, not a failure."""
    async with market(db) as m:
        most = "9223372036854.775807"
        answer = await m.post(
            m.buyer, f"/escrow/esc_{'0' * 32}/settle", {"release": most, "refund": "10.00"}
        )
        assert code_of(answer) == (422, "invalid_request")


async def test_bodies_that_are_not_strict_json(db: str) -> None:
    """Contract: bodies are strict JSON objects, or 400 and 422."""
    async with market(db) as m:
        for path in ("/agents", "/escrow", "/redeem"):
            for raw in RAW_BODIES:
                answer = await m.http.post(path, content=raw, headers=m.buyer.headers)
                assert code_of(answer) in ((400, "malformed"), (422, "invalid_request")), raw[:30]


async def test_bodies_over_the_limit(db: str) -> None:
    """Contract: 64 KiB for a body, 1 MiB for a redemption, announced or not, else 413."""
    async with market(db) as m:

        async def endless(chunks: int) -> Any:
            for _ in range(chunks):
                yield b" " * 65_536

        big = b" " * (64 * 1024 + 1)
        answer = await m.http.post("/agents", content=big)
        assert code_of(answer) == (413, "body_too_large")
        assert code_of(await m.http.post("/agents", content=endless(3))) == (413, "body_too_large")
        answer = await m.http.post("/redeem", content=endless(20), headers=m.buyer.headers)
        assert code_of(answer) == (413, "body_too_large")
        fits = await m.http.post("/redeem", content=b" " * 2**20, headers=m.buyer.headers)
        assert code_of(fits) == (422, "invalid_request")


async def test_bodies_of_countless_small_values(db: str) -> None:
    """Contract: at most 5000 values in a body, so that no body keeps the service from others."""
    members = ",".join(f'"k{number}":1' for number in range(5001)).encode()
    async with market(db) as m:
        for raw in (b"{" + members + b"}", b'{"items":[{' + members + b"}]}"):
            answer = await m.http.post("/redeem", content=raw, headers=m.provider.headers)
            assert code_of(answer) == (413, "body_too_large")
        memo = m.wish(memo="," * 500)
        assert (await m.post(m.buyer, "/escrow", memo)).status_code == 201


async def test_headers_without_end(db: str) -> None:
    """Contract: headers have a limit, whichever HTTP parser happens to be installed."""
    async with market(db) as m:
        host, port = m.escrow.url.removeprefix("http://").split(":")
        async with await anyio.connect_tcp(host, int(port)) as stream:
            lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 1000) for number in range(64))
            await stream.send(b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines)
            assert (await stream.receive()).startswith(b"HTTP/1.1 400 ")


async def test_more_than_a_thousand_items(db: str) -> None:
    """Contract: a batch has at most 1000 items."""
    async with market(db) as m:
        items = [{"voucher": "x", "amount": "1"}] * 1001
        body = {"journal": JOURNAL, "serial": 1, "items": items}
        assert code_of(await m.post(m.provider, "/redeem", body)) == (422, "invalid_request")


async def test_paths_that_name_nothing(db: str) -> None:
    """Contract: unknown paths and ids are problems with 404."""
    async with market(db) as m:
        for path in PATHS:
            answer = await m.http.get(path, headers=m.buyer.headers)
            assert code_of(answer) == (404, "not_found"), path


async def test_methods_that_are_not_there(db: str) -> None:
    """Contract: a wrong method is a problem with 405 and Allow."""
    async with market(db) as m:
        for method, path in (("PUT", "/escrow"), ("GET", "/redeem"), ("DELETE", "/agents/me")):
            answer = await m.http.request(method, path, headers=m.buyer.headers)
            assert code_of(answer) == (405, "method_not_allowed")
            assert "allow" in answer.headers


async def test_queries_that_mean_nothing(db: str) -> None:
    """Contract: query values are checked as strictly as bodies."""
    async with market(db) as m:
        for query in QUERIES:
            answer = await m.http.get(query, headers=m.buyer.headers)
            assert code_of(answer) == (422, "invalid_request"), query


async def test_strangers_are_asked_who_they_are(db: str) -> None:
    """Contract: without a good API key every route of agents answers 401 and changes nothing."""
    routes = (
        ("GET", "/agents/me"),
        ("POST", "/faucet/claim"),
        ("PUT", f"/journals/{JOURNAL}"),
        ("POST", "/escrow"),
        ("GET", "/escrow"),
        ("GET", "/escrow/esc_" + "0" * 32),
        ("POST", f"/escrow/esc_{'0' * 32}/close"),
        ("POST", "/redeem"),
        ("GET", "/changes"),
    )
    async with market(db) as m:
        for header, (method, path) in product(AUTHORIZATIONS, routes):
            headers = {"Authorization": header.encode("latin-1")}
            answer = await m.http.request(method, path, headers=headers)
            assert code_of(answer) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_amounts_in_odd_spellings(db: str) -> None:
    """M2 and M4: what Decimal reads is accepted, an exponent too; totals keep whole units."""
    async with market(db) as m:
        name = (await m.open("5e0"))["escrow_id"]
        for text, released in (("8.400000000000001e-05", "0.000084"), ("1E-1", "0.10")):
            answer = await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": text})
            assert answer.json()["released"] == released
        assert Decimal((await m.show(name))["remaining"]) == Decimal("4.90")


async def test_a_client_that_hangs_up_harms_nobody(db: str) -> None:
    """Contract: half a request changes nothing and the service goes on."""
    async with market(db) as m:
        host, port = m.escrow.url.removeprefix("http://").split(":")
        for _ in range(3):
            stream = await anyio.connect_tcp(host, int(port))
            async with stream:
                await stream.send(
                    b"POST /api/v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
                )
        assert (await m.post(None, "/agents", {"name": "next"})).status_code == 201


def test_low_order_and_malformed_keys_are_no_keys() -> None:
    """Security: a session key passes the curve check before it is stored."""
    from x402mw.escrow.bodies import NewJournal

    NewJournal.model_validate({"receipt_key": SESSION_KEY})
    for key in ("A" * 43, "AQ" + "A" * 41, SESSION_KEY + "=", SESSION_KEY[:-1]):
        with pytest.raises(ValueError):
            NewJournal.model_validate({"receipt_key": key})


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("127.0.0.1", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3::9", "2001:db8:1:2::/64"),
        (None, "unknown"),
        ("junk", "unknown"),
    ],
)
def test_what_the_faucet_counts_as_one_source(host: str | None, source: str) -> None:
    """Contract: an address, or an IPv6 /64, is one source; loopback is exempt."""
    assert claim_source(host) == source


NO_NAMES = ("%00", "abc%00", "esc_" + "0" * 32 + "%00", "%ED%A0%80", "%F0%9F%92%A9", "%0a", "a%2Fb")
"""What names nothing, and what a database may fail on."""


async def test_junk_in_every_part_of_every_path_and_query(db: str) -> None:
    """Contract: junk in a path names nothing, and in a query it is refused: never a 5xx."""
    async with market(db) as m:
        agent, wrong = await make_key(m, m.buyer, *SCOPES), []
        ids = {**IDS, "event_id": "1", "webhook_id": "wh_" + "0" * 32}
        for route in ROUTES:
            paths = [
                filled(route.path, {**ids, name: junk})
                for name, junk in product(re.findall(r"\{(\w+)\}", route.path), NO_NAMES)
            ]
            plain = filled(route.path, ids)
            queries = [f"{plain}?{name}=%00" for name in route.query.model_fields]
            for path in paths + queries:
                answer = await m.http.request(route.method, path, json={}, headers=agent.headers)
                if answer.status_code not in (404, 405, 422):
                    wrong.append((route.method, path, answer.status_code))
        assert wrong == []
