"""Deadlines: applied by whoever sees them first, postponed by outages. `docs/money.md` 6."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, update

from tests.escrow.market import JOURNAL, Market, code_of, market
from tests.escrow.operators import make_agent, make_key
from tests.support.escrow import reading
from x402mw.core.amounts import to_atomic
from x402mw.escrow import agreements, banking, deadlines, schema
from x402mw.escrow.disputes import DISPUTE_SECONDS
from x402mw.escrow.transactions import OPERATOR

pytestmark = pytest.mark.anyio
T0 = 1_800_000_000


async def test_an_expired_session_goes_home(db: str) -> None:
    """T1 and T3: valid iff now < expires_at; then the rest is refunded."""
    async with market(db) as m:
        name = (await m.open("5.00", expires_in_seconds=1800))["escrow_id"]
        await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
        await m.escrow.pass_time(1799)
        assert (await m.show(name))["status"] == "partially_released"
        await m.escrow.pass_time(1)
        ended = await m.show(name)
        assert (ended["status"], ended["close_reason"]) == ("settled", "expired_refund")
        assert (ended["released"], ended["refunded"]) == ("1.00", "4.00")
        assert await m.balance(m.buyer) == "99.00"


async def alive(m, seconds: int) -> None:
    """Lets time pass with heartbeats and without a sweeper."""
    for _ in range(seconds // 50):
        m.escrow.clock.advance(50)
        async with m.escrow.ledger.write():
            pass


async def test_any_access_applies_a_deadline(db: str) -> None:
    """T2: without any sweeper, the first reader or payer finds the money at home."""
    async with market(db, balance="5.00") as m:
        for look in range(4):
            name = (await m.open("5.00", expires_in_seconds=1800))["escrow_id"]
            await alive(m, 1900)
            if look == 0:
                assert await m.balance(m.buyer) == "5.00"
            elif look == 1:
                assert (await m.show(name))["status"] == "refunded"
            elif look == 2:
                changes = (await m.get(m.provider, "/changes", journal=JOURNAL)).json()["changes"]
                assert changes[-1]["state"] == "refunded"
            else:
                answer = await m.post(m.buyer, "/escrow", m.wish("5.00"))
                assert answer.status_code == 201


async def lock_timed(m: Market) -> str:
    """A manual escrow that is released after an hour."""
    wish = {"to_agent_id": m.provider.agent_id, "amount": "10.00", "auto_release_seconds": 3600}
    return str((await m.post(m.buyer, "/escrow", wish)).json()["escrow_id"])


async def test_lists_of_disputes_apply_a_deadline(db: str) -> None:
    """T2: without any sweeper, nobody is shown a dispute as open that time has ended."""
    async with market(db) as m:
        judge = await make_key(m, await m.escrow.new_agent(), "arbiter")
        paths = [f"/escrow/{await lock_timed(m)}/dispute" for _ in range(2)]
        for path in paths:
            await m.post(m.buyer, path, {"reason": "x", "amount": "6.00"})
        assert len((await m.get(judge, "/disputes")).json()["items"]) == 2
        await m.escrow.skip_time(DISPUTE_SECONDS)
        assert (await m.get(judge, "/disputes")).json()["items"] == []
        for asker, path in zip((m.buyer, judge), paths, strict=True):
            case = (await m.get(asker, f"{path}s")).json()["items"][0]
            assert (case["status"], case["agreement"]["status"]) == ("undecided", "released")
            assert case["agreement"]["released"] == "10.00"


async def test_fees_do_not_depend_on_a_sweeper(db: str) -> None:
    """T2 and I14: what the operator pays itself counts what is due to others, all of it."""
    async with market(db) as m:
        operator = await make_agent(m, "operator", "admin")
        for _ in range(2):
            await lock_timed(m)
        await m.escrow.skip_time(3600)
        body = {"amount": "0.10", "reference": "a"}
        taken = await m.post(operator, "/operator/fees", body)
        assert (taken.status_code, taken.json()["balance"]) == (201, "0.10")
        await lock_timed(m)
        await m.escrow.skip_time(3600)
        async with m.escrow.ledger.write() as tx:
            # As a command beside the service does it.
            left = await banking.book_fees(tx, OPERATOR, to_atomic("0.20"), "b")
        assert left["balance"] == "0.00"


async def test_what_waits_for_an_outage_costs_readers_nothing(
    db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5: while deadlines wait, a read of a party with something due writes nothing."""
    async with market(db) as m:
        name = await lock_timed(m)
        await m.escrow.skip_time(3599)
        m.escrow.clock.advance(100)
        await m.escrow.ledger.sweep()
        with monkeypatch.context() as patch:
            patch.setattr(m.escrow.ledger, "write", None)
            assert (await m.show(name))["status"] == "locked"
            assert await m.balance(m.buyer) == "90.00"
        await m.escrow.skip_time(600)
        assert (await m.show(name))["status"] == "released"


@pytest.mark.parametrize("of", [deadlines.Of.ALL, deadlines.Of.PARTY])
async def test_deadlines_are_found_by_their_index(db: str, of: deadlines.Of) -> None:
    """T2: looking for what is due never reads the sessions that have ended, however many."""
    query = deadlines.due_query(of)
    values = {"now": T0, "name": "ag_" + "0" * 32, "limit": 10}
    async with market(db) as m, reading(m.escrow.ledger) as connection:
        compiled = query.compile(
            connection.sync_engine,
            compile_kwargs={"literal_binds": False, "render_postcompile": True},
        )
        order = compiled.positiontup or []
        explain = "EXPLAIN QUERY PLAN"
        if connection.dialect.name == "postgresql":
            # It would rather read a small table whole, if it may.
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            await connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
            explain = "EXPLAIN"
        plan = await connection.exec_driver_sql(
            f"{explain} {compiled}", tuple(values.get(n, compiled.params[n]) for n in order)
        )
        scans = [step for step in map(str, plan) if "SEARCH" in step or "Scan" in step]
    assert scans
    assert all("escrows_due" in step for step in scans), scans


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_pile_of_deadlines_holds_nobody_up(
    db: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T2: whoever has much due waits for all of it; others have their turns in between."""
    monkeypatch.setattr(deadlines, "SWEEP_ITEMS_MAX", 5)
    async with market(db, balance="20.00") as m:
        hand = {"to_agent_id": m.provider.agent_id, "amount": "1.00", "expires_in_seconds": 45}
        for _ in range(17):
            assert (await m.post(m.buyer, "/escrow", hand)).status_code == 201
        other = await m.escrow.new_agent(balance="1.00")
        m.escrow.clock.advance(46)
        writer = m.escrow.ledger._writer
        pay = {"to_agent_id": m.provider.agent_id, "amount": "20.00"}
        async with writer:
            first = (
                m.get(m.buyer, "/agents/me")
                if method == "GET"
                else m.post(m.buyer, "/transfers", pay)
            )
            asked = [asyncio.create_task(first)]
            await queued(writer, 1)
            asked.append(
                asyncio.create_task(m.post(other, "/transfers", {**pay, "amount": "1.00"}))
            )
            await queued(writer, 2)
        answers = [await task for task in asked]
        if method == "GET":
            assert answers[0].json()["balance"] == "20.00"
        assert [answer.status_code < 300 for answer in answers] == [True, True]
        async with reading(m.escrow.ledger) as connection:
            kinds = await connection.exec_driver_sql("SELECT kind FROM entries ORDER BY seq")
            told = [kind for (kind,) in kinds if kind not in ("lock", "deposit")]
        timed = "deadline"
        assert told[:5] == [timed] * 5
        assert told[5:] == ["transfer", *[timed] * 12, *(["transfer"] if method == "POST" else [])]


async def test_one_escrow_that_fails_keeps_no_other_waiting(
    db: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """T2: a sweep goes on past what cannot be applied, says so, and keeps the service alive."""
    async with market(db) as m:
        hand = {"to_agent_id": m.provider.agent_id, "amount": "1.00", "expires_in_seconds": 40}
        made = [(await m.post(m.buyer, "/escrow", hand)).json()["escrow_id"] for _ in range(5)]
        works = agreements.pass_time

        async def pass_time(tx: Any, agreement: Any, now: int, since: int = 0) -> Any:
            if agreement.escrow.escrow_id == made[2]:
                raise ZeroDivisionError
            return await works(tx, agreement, now, since)

        monkeypatch.setattr(agreements, "pass_time", pass_time)
        m.escrow.clock.advance(41)
        await m.escrow.ledger.sweep()
        async with reading(m.escrow.ledger) as connection:
            found = await connection.execute(
                select(schema.escrows.c.escrow_id, schema.escrows.c.status)
            )
            ended = {name for name, status in found if status == "refunded"}
            alive = (await connection.execute(select(schema.service.c.heartbeat))).scalar_one()
        assert ended == set(made) - {made[2]}
        assert alive == m.escrow.ledger.now()
        (told,) = [r for r in caplog.records if getattr(r, "event", "") == "deadline_failed"]
        assert told.escrow == made[2]


async def test_one_damaged_escrow_stops_nobody_else(
    db: str, caplog: pytest.LogCaptureFixture
) -> None:
    """T2, T5: after an outage others write on, and its parties have the rest of their money."""
    async with market(db) as m:
        hand = {"to_agent_id": m.provider.agent_id, "amount": "1.00", "expires_in_seconds": 40}
        made = [(await m.post(m.buyer, "/escrow", hand)).json()["escrow_id"] for _ in range(2)]
        await set_carry(m, made[0], "x")
        await m.escrow.skip_time(41)
        m.escrow.clock.advance(100)
        assert (await m.post(m.buyer, "/escrow", hand)).status_code == 201
        assert (await m.show(made[1]))["status"] == "refunded"
        told = [r for r in caplog.records if getattr(r, "event", "") == "deadline_failed"]
        assert {record.escrow for record in told} == {made[0]}
        await set_carry(m, made[0], "0")
        await m.escrow.skip_time(600)
        assert (await m.show(made[0]))["status"] == "refunded"


async def set_carry(m: Market, name: str, carry: str) -> None:
    """Writes into the database what the service would not."""
    async with m.escrow.ledger._engine.begin() as connection:
        of_one = update(schema.agreements).where(schema.agreements.c.escrow_id == name)
        await connection.execute(of_one.values(carry=carry))


async def queued(writer: asyncio.Lock, count: int) -> None:
    """Waits until so many wait for the writer."""
    while len(writer._waiters or ()) < count:  # noqa: ASYNC110 (a queue tells nobody)
        await asyncio.sleep(0.001)


async def test_a_late_deadline_is_stamped_with_its_own_time(db: str) -> None:
    """T2: the entry says both when it was written and when it counts."""
    async with market(db) as m:
        await m.open("5.00", expires_in_seconds=1800)
        await alive(m, 2500)
        await m.balance(m.buyer)
        entries = schema.entries
        async with reading(m.escrow.ledger) as connection:
            row = (
                await connection.execute(select(entries).where(entries.c.kind == "deadline"))
            ).one()
        assert (row.created_at, row.effective_at) == (T0 + 2500, T0 + 1800)


async def test_a_closing_session_waits_for_its_newest_voucher(db: str) -> None:
    """Rule 5: closing ends at the claim_until of the newest token; redeem works until then."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        await m.post(m.buyer, f"/escrow/{name}/close")
        await m.escrow.pass_time(899)
        (last,) = await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
        assert last["ok"]
        await m.escrow.pass_time(1)
        (late,) = await m.redeem({"voucher": m.voucher(name, "2"), "amount": "2"})
        assert (late["ok"], late["code"]) == (False, "invalid_state")
        ended = await m.show(name)
        assert (ended["status"], ended["close_reason"]) == ("settled", "buyer_close")


async def test_a_close_with_no_live_token_ends_at_once(db: str) -> None:
    """Rule 5: when no voucher could count any more the buyer has the rest immediately."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        await m.escrow.pass_time(900)
        closed = (await m.post(m.buyer, f"/escrow/{name}/close")).json()
        assert (closed["status"], closed["close_reason"]) == ("refunded", "buyer_close")


async def test_no_token_in_the_last_seconds(db: str) -> None:
    """T4: near its expiry a session issues no token, and takes no top-up that nobody could use."""
    async with market(db) as m:
        name = (await m.open(expires_in_seconds=1800))["escrow_id"]
        await m.escrow.pass_time(1499)
        token = (await m.post(m.buyer, f"/escrow/{name}/token")).json()
        assert token["claim_until"] == token["expires_at"] == T0 + 1800
        await m.escrow.pass_time(1)
        for path, body in (("token", None), ("topup", {"amount": "1"})):
            answer = await m.post(m.buyer, f"/escrow/{name}/{path}", body)
            assert code_of(answer) == (409, "session_ending")


async def test_an_outage_takes_nothing_from_a_provider(db: str) -> None:
    """T5: deadlines that passed while the escrow was down wait for 600 s after it is back."""
    async with market(db) as m:
        closing = (await m.open())["escrow_id"]
        expiring = (await m.open(expires_in_seconds=1800))["escrow_id"]
        await m.post(m.buyer, f"/escrow/{closing}/close")
        m.escrow.clock.advance(100_000)
        verdicts = await m.redeem(
            {"voucher": m.voucher(closing, "1"), "amount": "1"},
            {"voucher": m.voucher(expiring, "2"), "amount": "2"},
        )
        assert [item["redeemed"] for item in verdicts] == ["1.00", "2.00"]
        await m.escrow.pass_time(599)
        assert (await m.show(closing))["status"] == "closing"
        await m.escrow.pass_time(1)
        assert (await m.show(closing))["refunded"] == "4.00"
        assert (await m.show(expiring))["refunded"] == "3.00"


async def test_what_was_due_before_an_outage_stays_due(db: str) -> None:
    """T2 and T5: a deadline inside the time the service was alive is not postponed later."""
    async with market(db) as m:
        name = (await m.open(expires_in_seconds=1800))["escrow_id"]
        await alive(m, 1900)
        m.escrow.clock.advance(5000)
        (verdict,) = await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
        assert verdict["code"] == "invalid_state"
        assert (await m.show(name))["status"] == "refunded"


async def test_a_clock_that_jumps_back_harms_nobody(db: str) -> None:
    """Failures: a clock set back moves only expiry decisions."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        m.escrow.clock.advance(-7200)
        (verdict,) = await m.redeem({"voucher": m.voucher(name, "1"), "amount": "1"})
        assert verdict["ok"]
        m.escrow.clock.advance(7200)
        assert (await m.show(name))["status"] == "partially_released"


async def test_a_clock_that_was_far_ahead_leaves_no_deadline_waiting(db: str) -> None:
    """T5: the grace after a jump ahead ends when the clock is set right again."""
    async with market(db) as m:
        name = (await m.open(expires_in_seconds=1800))["escrow_id"]
        for seconds in (10**8, -(10**8)):
            m.escrow.clock.advance(seconds)
            await m.escrow.ledger.sweep()
        await m.escrow.pass_time(1800)
        assert (await m.show(name))["status"] == "refunded"


async def test_a_pile_of_reviews_is_done_in_turns(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T2: what ends within one escrow counts too, so that no transaction does very much."""
    monkeypatch.setattr(deadlines, "SWEEP_ITEMS_MAX", 4)
    async with market(db, balance="20.00") as m:
        parts = [{"name": f"m{number}", "amount": "1.00"} for number in range(3)]
        hand = {"to_agent_id": m.provider.agent_id, "amount": "3.00", "review_seconds": 60}
        for _ in range(4):
            made = (await m.post(m.buyer, "/escrow", {**hand, "milestones": parts})).json()
            for part in parts:
                path = f"/escrow/{made['escrow_id']}/deliver"
                delivery = {"milestone": part["name"], "proof": "x"}
                assert (await m.post(m.provider, path, delivery)).status_code == 200
        await m.escrow.skip_time(60)
        async with m.escrow.ledger.write() as tx:
            begun = tx.service.entry_seq
            assert await deadlines.apply(tx, limit=4) == 4
            assert tx.service.entry_seq - begun == 6
        await m.escrow.ledger.sweep()
        assert await m.balance(m.provider) == "11.88"
