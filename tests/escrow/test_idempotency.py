"""Idempotency keys: `docs/money.md` 8."""

import asyncio

import pytest
from sqlalchemy import func, select

from tests.escrow.market import JOURNAL, code_of, market
from tests.support.escrow import reading
from x402mw.escrow import schema
from x402mw.escrow.idempotency import KEPT_SECONDS
from x402mw.escrow.manual_bodies import PROOFS_CHARACTERS_MAX

pytestmark = pytest.mark.anyio


async def test_a_replay_gives_the_stored_answer_and_moves_nothing(db: str) -> None:
    """Rule 8: same key and body = the same bytes again, marked, on every route that moves money."""
    async with market(db) as m:
        name, other = (await m.open())["escrow_id"], (await m.open())["escrow_id"]
        item = {"voucher": m.voucher(name, "1"), "amount": "1"}
        batch = {"journal": JOURNAL, "serial": 1, "items": [item]}
        for agent, path, body in (
            (m.buyer, "/faucet/claim", None),
            (m.buyer, "/escrow", m.wish("2")),
            (m.buyer, f"/escrow/{name}/topup", {"amount": "1"}),
            (m.buyer, f"/escrow/{name}/release", {"cumulative": "0.5"}),
            (m.buyer, f"/escrow/{other}/close", None),
            (m.provider, "/redeem", batch),
            (m.provider, f"/escrow/{name}/close", None),
        ):
            first = await m.post(agent, path, body, key="one")
            balances = await m.balance(m.buyer), await m.balance(m.provider)
            again = await m.post(agent, path, body, key="one")
            assert first.is_success
            assert "idempotent-replayed" not in first.headers
            assert again.headers["idempotent-replayed"] == "true"
            assert (again.status_code, again.content) == (first.status_code, first.content)
            assert (await m.balance(m.buyer), await m.balance(m.provider)) == balances


async def test_another_body_under_the_same_key(db: str) -> None:
    """Rule 8: other body = 422; spelling the same JSON differently is the same body."""
    async with market(db) as m:
        first = await m.post(m.buyer, "/escrow", m.wish("2"), key="k")
        other = await m.post(m.buyer, "/escrow", m.wish("3"), key="k")
        assert code_of(other) == (422, "idempotency_mismatch")
        respelt = dict(reversed(m.wish("2").items()))
        assert (await m.post(m.buyer, "/escrow", respelt, key="k")).content == first.content
        assert await m.balance(m.buyer) == "98.00"


async def test_a_key_is_scoped_to_principal_and_route(db: str) -> None:
    """Rule 8: the same key of another agent, or on another path, is another key."""
    async with market(db) as m:
        first, second = [(await m.open())["escrow_id"] for _ in range(2)]
        for name in (first, second):
            await m.post(m.buyer, f"/escrow/{name}/topup", {"amount": "1"}, key="k")
        for agent in (m.buyer, m.provider):
            answer = await m.post(agent, "/faucet/claim", key="k")
            assert answer.status_code == 200
        assert (await m.show(second))["amount"] == "6.00"


async def test_a_key_is_the_same_under_both_bases_and_names(db: str) -> None:
    """Rule 8: of one operation there is one route; its answer is told in the dialect that asks."""
    async with market(db) as m:
        headers = {**m.buyer.headers, "Idempotency-Key": "k"}
        root = m.escrow.url
        wish = {"to_agent_id": m.provider.agent_id, "amount": "5.00"}
        plain = await m.http.post("/escrow", json=wish, headers=headers)
        other = await m.http.post(f"{root}/api/escrow", json=wish, headers=headers)
        assert other.headers["idempotent-replayed"] == "true"
        assert other.json() == {**other.json(), **plain.json()}
        assert other.json()["amount_usdc"] == 5
        name = plain.json()["escrow_id"]
        answers = [
            await m.http.post(f"{root}{path}", json={"amount": "1.00"}, headers=headers)
            for path in (
                f"/api/escrow/{name}/release-partial",
                f"/api/v1/escrow/{name}/release",
                f"/api/v1/escrow/{name}/release-partial",
                f"/api/escrow/{name}/release",
            )
        ]
        assert [answer.headers.get("idempotent-replayed") for answer in answers[1:]] == ["true"] * 3
        assert answers[0].content == answers[3].content
        assert answers[1].content == answers[2].content
        assert "released_usdc" not in answers[1].json()
        assert await m.balance(m.provider) == "0.99"
        assert await m.balance(m.buyer) == "95.00"


async def test_a_refusal_that_depended_on_state_stays(db: str) -> None:
    """Rule 8: no funds once means that key never succeeds; a fresh key does."""
    async with market(db, balance="1.00") as m:
        refused = await m.post(m.buyer, "/escrow", m.wish("5"), key="k")
        assert code_of(refused) == (409, "insufficient_funds")
        await m.escrow.deposit(m.buyer.agent_id, "50")
        again = await m.post(m.buyer, "/escrow", m.wish("5"), key="k")
        assert again.headers["idempotent-replayed"] == "true"
        assert (code_of(again), again.content) == (code_of(refused), refused.content)
        assert (await m.post(m.buyer, "/escrow", m.wish("5"), key="fresh")).status_code == 201


async def test_what_is_malformed_uses_up_no_key(db: str) -> None:
    """Rule 8: a body that never reached the ledger leaves its key free."""
    async with market(db) as m:
        assert (await m.post(m.buyer, "/escrow", m.wish("x"), key="k")).status_code == 422
        assert (await m.post(m.buyer, "/escrow", m.wish("2"), key="k")).status_code == 201


async def test_fifty_at_once_move_money_once(db: str) -> None:
    """Rule 8: while one runs the others get 409 with Retry-After, afterwards the stored answer."""
    async with market(db) as m:
        answers = await asyncio.gather(
            *(m.post(m.buyer, "/escrow", m.wish("2"), key="k") for _ in range(50))
        )
        stored = {answer.content for answer in answers if answer.status_code == 201}
        for answer in answers:
            if answer.status_code != 201:
                assert code_of(answer) == (409, "idempotency_running")
                assert answer.headers["retry-after"] == "1"
        assert len(stored) == 1
        assert await m.balance(m.buyer) == "98.00"


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "\xe9"])
async def test_keys_that_are_no_keys(key: str, db: str) -> None:
    """Rule 8: 1 to 255 printable characters, else 400."""
    async with market(db) as m:
        headers = {**m.buyer.headers, "Idempotency-Key": key.encode("latin-1")}
        answer = await m.http.post("/escrow", json=m.wish(), headers=headers)
        assert code_of(answer) == (400, "malformed")
        assert await m.balance(m.buyer) == "100.00"


async def test_answers_are_kept_for_a_week(db: str) -> None:
    """Rule 8: kept for 7 days, then forgotten; but not while a jump of the clock may be wrong."""
    async with market(db) as m:
        await m.post(m.buyer, "/escrow", m.wish("2"), key="k")
        for jump, waited, replayed in ((KEPT_SECONDS - 700, 650, True), (0, 100, False)):
            m.escrow.clock.advance(jump)
            await m.escrow.pass_time(waited)
            answer = await m.post(m.buyer, "/escrow", m.wish("2"), key="k")
            assert ("idempotent-replayed" in answer.headers) is replayed


async def test_a_clock_that_jumps_ahead_forgets_no_answer(db: str) -> None:
    """Rule 8 and Failures: after a wrong clock, or a long outage, a retry still moves nothing."""
    async with market(db) as m:
        first = await m.post(m.buyer, "/escrow", m.wish("2"), key="k")
        for jump in (10**8, -(10**8)):
            m.escrow.clock.advance(jump)
            await m.escrow.pass_time(100)
            again = await m.post(m.buyer, "/escrow", m.wish("2"), key="k")
            assert again.content == first.content


async def test_proofs_have_one_bound_and_long_answers_are_kept_short(db: str) -> None:
    """Rule 8: what few bytes can ask for again and again takes little room, and is replayed."""
    async with market(db) as m:
        milestones = [{"name": f"m{number}", "amount": "1.00"} for number in range(6)]
        wish = {"to_agent_id": m.provider.agent_id, "amount": "6.00", "milestones": milestones}
        path = f"/escrow/{(await m.post(m.buyer, '/escrow', wish)).json()['escrow_id']}"
        for number in range(5):
            delivery = {"milestone": f"m{number}", "proof": "\U0001d538" * 4000}
            assert (await m.post(m.provider, f"{path}/deliver", delivery)).status_code == 200
        over = await m.post(m.provider, f"{path}/deliver", {"milestone": "m5", "proof": "x"})
        assert code_of(over) == (422, "invalid_request")
        assert over.json()["limit"] == PROOFS_CHARACTERS_MAX == 20_000
        bare = await m.post(m.provider, f"{path}/deliver", {"milestone": "m5"})
        assert bare.json()["milestones"][5]["state"] == "delivered"
        first, again = [
            await m.post(m.buyer, f"{path}/release", {"cumulative": "0"}, key="k") for _ in range(2)
        ]
        assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")
        assert len(first.content) > 80_000
        kept = select(func.length(schema.idempotency.c.answer))
        async with reading(m.escrow.ledger) as connection:
            assert (await connection.execute(kept)).scalar_one() < 2000
