"""Where the rules of manual escrows meet: the same second, the wrong person, one thing twice."""

import hashlib
from typing import Any

import pytest
from sqlalchemy import select

from tests.escrow.market import Market, code_of, market
from tests.escrow.operators import make_agent, make_key, make_tenant
from tests.escrow.test_manual_api import done, lock, refused
from tests.support.escrow import Agent, reading
from x402mw.core.amounts import to_atomic
from x402mw.escrow import agents, disputes, schema
from x402mw.escrow.rules import step

pytestmark = pytest.mark.anyio

ANSWERS = ("deliver", "approve", "reject")
OUTCOME = "it is done"
CONDITION = {"sha256": hashlib.sha256(OUTCOME.encode()).hexdigest()}


async def entries(m: Market, escrow_id: str) -> list[tuple[str, int, str | None]]:
    """Kind, second at which it counted, and actor of each entry about an escrow."""
    table = schema.entries.c
    query = select(table.kind, table.effective_at, table.actor).where(table.escrow_id == escrow_id)
    async with reading(m.escrow.ledger) as connection:
        return [(k, at, who) for k, at, who in await connection.execute(query.order_by(table.seq))]


async def arbiter(m: Market) -> Agent:
    """An agent with an arbiter's key and nothing else."""
    return await make_agent(m, "public", "arbiter")


@pytest.mark.parametrize("what", ["release", "deliver", "dispute", "refund", "topup", "extend"])
async def test_the_second_of_expiry_belongs_to_time(db: str, what: str) -> None:
    """T1: valid iff now < expires_at; at that second everybody comes too late, whoever asks."""
    bodies: dict[str, dict[str, Any]] = {
        "dispute": {"reason": "late"},
        "topup": {"amount": "1.00"},
        "extend": {"seconds": 60},
    }
    async with market(db) as m:
        caller = m.provider if what == "deliver" else m.buyer
        early, late = [await lock(m, auto_release_seconds=50) for _ in range(2)]
        m.escrow.clock.now += 49
        await done(m, caller, early, what, **bodies.get(what, {}))
        m.escrow.clock.now += 1
        assert await refused(m, caller, late, what, **bodies.get(what, {})) == (
            409,
            "invalid_state",
        )
        shown = await m.show(late)
        assert (shown["status"], shown["close_reason"]) == ("released", "expired_release")


@pytest.mark.parametrize("what", ["dispute", "reject", "refund"])
async def test_the_second_of_the_end_of_a_review_belongs_to_time(db: str, what: str) -> None:
    """Rule 5: a buyer who answers a delivery at review_until answers too late."""
    body = {"reason": "late"} if what == "dispute" else {}
    async with market(db) as m:
        name = await lock(m, review_seconds=50)
        await done(m, m.provider, name, "deliver", proof="x")
        m.escrow.clock.now += 50
        assert await refused(m, m.buyer, name, what, **body) == (409, "invalid_state")
        assert (await m.show(name))["status"] == "released"


@pytest.mark.parametrize(("on_expiry", "status"), [("release", "released"), ("refund", "refunded")])
async def test_a_dispute_outlives_the_escrow_and_its_end_ends_both(
    db: str, on_expiry: str, status: str
) -> None:
    """T2, rule 5: dispute, expiry, withdrawal: the rest first, D at the second it came free."""
    async with market(db) as m:
        name = await lock(m, expires_in_seconds=100, on_expiry=on_expiry)
        await done(m, m.buyer, name, "dispute", amount="6.00", reason="late")
        await m.escrow.pass_time(200)
        shown = await m.show(name)
        assert (shown["status"], shown["remaining"]) == ("disputed", "6.00")
        for what in ("deliver", "release", "topup", "extend"):
            caller = m.provider if what == "deliver" else m.buyer
            body = {"topup": {"amount": "1.00"}, "extend": {"seconds": 9}}.get(what, {})
            assert (await m.post(caller, f"/escrow/{name}/{what}", body)).status_code == 409
        ended = await done(m, m.buyer, name, "dispute/withdraw")
        assert (ended["status"], ended["remaining"]) == (status, "0.00")
        start, buyer = shown["created_at"], m.buyer.agent_id
        assert await entries(m, name) == [
            ("lock", start, buyer),
            ("dispute", start, buyer),
            ("deadline", start + 100, None),
            ("withdraw", start + 200, buyer),
            ("deadline", start + 200, None),
        ]


async def test_a_rejection_after_expiry_can_be_answered(db: str) -> None:
    """X24: a review may outlast the escrow; rejecting then is no refund, but leaves a day."""
    async with market(db) as m:
        name = await lock(m, expires_in_seconds=30, review_seconds=50)
        await done(m, m.provider, name, "deliver", proof="x")
        m.escrow.clock.now += 40
        assert (await m.show(name))["status"] == "delivered"
        assert await refused(m, m.buyer, name, "refund") == (409, "invalid_state")
        shown = await done(m, m.buyer, name, "reject", reason="junk")
        assert (shown["status"], shown["expires_at"]) == (
            "locked",
            int(m.escrow.clock()) + step.ANSWER_SECONDS,
        )
        await m.escrow.skip_time(step.ANSWER_SECONDS - 1)
        await done(m, m.provider, name, "deliver", proof="y")
        await done(m, m.buyer, name, "reject", reason="junk")
        await m.escrow.skip_time(step.ANSWER_SECONDS)
        ended = await m.show(name)
        assert (ended["status"], ended["close_reason"]) == ("refunded", "expired_refund")


async def test_a_dispute_over_a_unit_silences_nobody(db: str) -> None:
    """Rule 5: the other party raises it to everything, which neither takes back."""
    async with market(db) as m:
        name = await lock(m, review_seconds=50)
        await done(m, m.provider, name, "deliver", proof="junk")
        await done(m, m.provider, name, "dispute", amount="0.000001", reason="a unit")
        again = {"reason": "again"}
        assert await refused(m, m.provider, name, "dispute", **again) == (409, "invalid_state")
        part = {"amount": "9.00", "reason": "most of it"}
        assert await refused(m, m.buyer, name, "dispute", **part) == (409, "invalid_state")
        raised = await done(m, m.buyer, name, "dispute", reason="junk", evidence="see for yourself")
        assert (raised["disputed"], raised["dispute"]["number"]) == ("10.00", 2)
        for agent in (m.buyer, m.provider):
            assert await refused(m, agent, name, "dispute", **again) == (409, "invalid_state")
            gone = await refused(m, agent, name, "dispute/withdraw")
            assert gone == (403, "not_the_opener")
        cases = (await m.get(m.buyer, f"/escrow/{name}/disputes")).json()["items"]
        assert [(case["number"], case["status"]) for case in cases] == [(2, "open"), (1, "raised")]
        shares = {"to_provider": "0", "to_buyer": "10"}
        ended = await done(m, await arbiter(m), name, "dispute/resolve", **shares)
        assert ended["status"] == "refunded"


async def test_nobody_hurries_the_end_by_a_dispute(db: str) -> None:
    """E11: a provider's dispute that nobody decides is as if withdrawn, and counts as that."""
    async with market(db) as m:
        name = await lock(m, auto_release_hours=24 * 90)
        for _ in range(3):
            await done(m, m.provider, name, "dispute", reason="pay me")
            await m.escrow.skip_time(disputes.DISPUTE_SECONDS)
            assert (await m.show(name))["status"] == "locked"
        often = (409, "withdrawn_too_often")
        assert await refused(m, m.provider, name, "dispute", reason="pay me") == often
        assert (await done(m, m.buyer, name, "refund"))["status"] == "refunded"


async def test_a_unit_in_dispute_gains_no_time_to_reject(db: str) -> None:
    """Rule 5: what waits for a dispute is past its review, and is paid when the dispute ends."""
    async with market(db) as m:
        name = await lock(m, review_seconds=50)
        await done(m, m.provider, name, "deliver", proof="x")
        await done(m, m.buyer, name, "dispute", amount="0.000001", reason="a unit")
        m.escrow.clock.now += 50
        assert (await m.show(name))["status"] == "disputed"
        assert await refused(m, m.buyer, name, "reject") == (409, "review_over")
        assert await refused(m, m.buyer, name, "refund") == (409, "invalid_state")
        ended = await done(m, m.buyer, name, "dispute/withdraw")
        assert (ended["status"], ended["released"]) == ("released", "10.00")


async def test_a_disputed_escrow_is_not_closed(db: str) -> None:
    """Rule 5: neither party ends what an arbiter is to decide; the provider may give it back."""
    async with market(db) as m:
        name = await lock(m)
        await done(m, m.provider, name, "dispute", reason="unpaid")
        for agent in (m.buyer, m.provider):
            assert await refused(m, agent, name, "close") == (409, "invalid_state")
            assert await refused(m, agent, name, "refund") == (409, "not_covered")
        for what in ("approve", "deliver", "reject"):
            caller = m.provider if what == "deliver" else m.buyer
            assert await refused(m, caller, name, what) == (409, "invalid_state")


async def test_who_may_not_decide(db: str) -> None:
    """Rule 5: no party, payee or referrer decides, nor anybody without the scope or of test."""
    async with market(db) as m:
        payee, referrer = await m.escrow.new_agent("payee"), await m.escrow.new_agent("referrer")
        payees = [
            {"agent_id": m.provider.agent_id, "fraction": "0.5"},
            {"agent_id": payee.agent_id, "fraction": "0.5"},
        ]
        name = await lock(m, payees=payees, referral_code=referrer.agent_id)
        await done(m, m.buyer, name, "dispute", reason="late", evidence="nothing came")
        shares = {"to_provider": "10", "to_buyer": "0"}
        path = "dispute/resolve"
        for agent in (m.buyer, m.provider, payee, referrer):
            assert await refused(m, agent, name, path, **shares) == (403, "scope")
            judge = await make_key(m, agent, "arbiter")
            assert await refused(m, judge, name, path, **shares) == (403, "arbiter_is_party")
        await make_tenant(m, "toys", "test")
        toy = await make_agent(m, "toys", "arbiter")
        assert (await m.get(toy, "/disputes")).json() == {"items": [], "next": None}
        assert await refused(m, toy, name, path, **shares) == (404, "not_found")
        judge = await arbiter(m)
        assert await refused(m, judge, name, path, to_provider="10", to_buyer="0.000001") == (
            409,
            "not_covered",
        )
        ended = await done(m, judge, name, path, to_provider="4", to_buyer="6", reason="some came")
        assert (ended["status"], ended["released"], ended["refunded"]) == (
            "settled",
            "4.00",
            "6.00",
        )
        assert await refused(m, judge, name, path, **shares) == (409, "invalid_state")


async def test_a_late_decision_is_none(db: str) -> None:
    """Rule 5, T2: at its deadline a dispute is undecided, even if an arbiter sees it first."""
    async with market(db) as m:
        name = await lock(m, auto_release_hours=1)
        await done(m, m.buyer, name, "dispute", reason="late")
        judge = await arbiter(m)
        await m.escrow.skip_time(disputes.DISPUTE_SECONDS)
        shares = {"to_provider": "0", "to_buyer": "10"}
        assert await refused(m, judge, name, "dispute/resolve", **shares) == (409, "invalid_state")
        assert (await m.show(name))["close_reason"] == "undecided"
        assert (await entries(m, name))[-1][2] is None


async def test_evidence_has_a_limit(db: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds: each party makes so many statements in a dispute, whatever the other says."""
    monkeypatch.setattr(disputes, "EVIDENCE_MAX", 2)
    async with market(db) as m:
        name = await lock(m)
        said = {"content": "so it was"}
        assert await refused(m, m.buyer, name, "dispute/evidence", **said) == (409, "invalid_state")
        await done(m, m.buyer, name, "dispute", reason="late", evidence="first")
        await done(m, m.buyer, name, "dispute/evidence", **said)
        often = (409, "too_much_evidence")
        assert await refused(m, m.buyer, name, "dispute/evidence", **said) == often
        for _ in range(2):
            await done(m, m.provider, name, "dispute/evidence", **said)
        assert await refused(m, m.provider, name, "dispute/evidence", **said) == often
        await done(m, m.buyer, name, "dispute/withdraw")
        await done(m, m.buyer, name, "dispute", reason="again", evidence="first")


async def test_a_milestone_is_paid_once(db: str) -> None:
    """Rule 5: approved, released or reviewed, a milestone is paid by one of them only."""
    parts = [{"name": name, "amount": "3.00"} for name in ("a", "b", "c")]
    async with market(db) as m:
        name = await lock(m, milestones=parts, review_seconds=50)
        await done(m, m.buyer, name, "approve", milestone="a")
        await done(m, m.buyer, name, "release", milestone="b")
        await done(m, m.provider, name, "deliver", milestone="c")
        m.escrow.clock.now += 50
        assert (await m.show(name))["released"] == "9.00"
        for part in ("a", "b", "c"):
            for what in ("approve", "release"):
                assert await refused(m, m.buyer, name, what, milestone=part) == (
                    409,
                    "invalid_state",
                )
            for what in ("deliver", "dispute"):
                body = {"reason": "?"} if what == "dispute" else {}
                assert await refused(m, m.provider, name, what, milestone=part, **body) == (
                    409,
                    "invalid_state",
                )
        assert (await done(m, m.buyer, name, "close"))["refunded"] == "1.00"


async def test_to_strangers_an_escrow_does_not_exist(db: str) -> None:
    """Access: all routes of an escrow say 404 to third agents, payees and referrers included."""
    routes: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("release", "refund", "close", "token", *ANSWERS)},
        **{name: {"amount": "1"} for name in ("topup", "return", "release-partial")},
        "settle": {"release": "1", "refund": "1"},
        "extend": {"seconds": 60},
        "dispute": {"reason": "?"},
        "dispute/evidence": {"content": "?"},
        "dispute/withdraw": {},
    }
    async with market(db) as m:
        stranger = await m.escrow.new_agent("stranger")
        payees = [{"agent_id": stranger.agent_id, "fraction": "1"}]
        for name in (await lock(m), await lock(m, payees=payees), (await m.open())["escrow_id"]):
            for route, body in routes.items():
                assert await refused(m, stranger, name, route, **body) == (404, "not_found"), route
            answer = await m.get(stranger, f"/escrow/{name}")
            assert code_of(answer) == (404, "not_found")
        assert (await m.get(stranger, "/escrow")).json()["items"] == []


async def test_a_condition_asks_for_the_proof_and_not_for_the_person(db: str) -> None:
    """E24: a stranger with the outcome pays the provider, learns nothing, and does it once."""
    async with market(db) as m:
        stranger = await m.escrow.new_agent("stranger")
        name, plain, disputed = (
            await lock(m, condition=CONDITION, expires_in_seconds=50),
            await lock(m),
            await lock(m, condition=CONDITION),
        )
        said = {"outcome": OUTCOME}
        assert await refused(m, stranger, plain, "condition", **said) == (404, "not_found")
        assert await refused(m, m.provider, plain, "condition", **said) == (409, "no_condition")
        session = (await m.open())["escrow_id"]
        assert await refused(m, stranger, session, "condition", **said) == (404, "not_found")
        await make_tenant(m, "toys", "test")
        toy = await make_agent(m, "toys")
        assert await refused(m, toy, name, "condition", **said) == (404, "not_found")
        await done(m, m.buyer, disputed, "dispute", reason="forged")
        assert await refused(m, stranger, disputed, "condition", **said) == (409, "not_covered")
        assert await done(m, stranger, name, "condition", **said) == {
            "escrow_id": name,
            "met": True,
        }
        assert await refused(m, stranger, name, "condition", **said) == (409, "invalid_state")
        late = await lock(m, condition=CONDITION, expires_in_seconds=50)
        m.escrow.clock.now += 50
        assert await refused(m, stranger, late, "condition", **said) == (409, "invalid_state")
        assert (await m.show(late))["status"] == "refunded"


async def test_the_two_kinds_do_not_mix(db: str) -> None:
    """Rule 4: what one kind knows is refused by the other, and moves nothing."""
    bodies: dict[str, dict[str, Any]] = {
        **{name: {} for name in ("refund", "dispute/withdraw", *ANSWERS)},
        "settle": {"release": "1", "refund": "1"},
        "dispute": {"reason": "?"},
        "dispute/evidence": {"content": "?"},
    }
    async with market(db) as m:
        session, manual = (await m.open())["escrow_id"], await lock(m)
        for what, body in bodies.items():
            caller = m.provider if what == "deliver" else m.buyer
            assert await refused(m, caller, session, what, **body) == (409, "wrong_kind"), what
        voucher = {"voucher": m.voucher(manual, "5"), "amount": "5"}
        (verdict,) = await m.redeem(voucher)
        assert verdict["code"] == "unknown_session"
        named = {"cumulative": "1", "to_agent_id": m.buyer.agent_id}
        assert await refused(m, m.buyer, session, "release", **named) == (409, "recipient_mismatch")
        assert await refused(m, m.buyer, manual, "token") == (409, "wrong_kind")
        assert (await m.show(manual))["released"] == "0.00"
        mixed = {**m.wish(), "milestones": [{"name": "a", "amount": "1"}]}
        assert code_of(await m.post(m.buyer, "/escrow", mixed)) == (422, "invalid_request")


async def test_what_time_gave_can_be_spent_at_once(db: str) -> None:
    """I14: payees and referrers need no sweeper to have what a deadline paid them."""
    async with market(db) as m:
        payee, referrer = await m.escrow.new_agent("payee"), await m.escrow.new_agent("referrer")
        payees = [{"agent_id": payee.agent_id, "fraction": "1"}]
        more = {"payees": payees, "referral_code": referrer.agent_id}
        await lock(m, auto_release_seconds=50, **more)
        m.escrow.clock.now += 50
        sent = {"to_agent_id": m.buyer.agent_id, "amount": "9.90"}
        assert (await m.post(payee, "/transfers", sent)).status_code == 201
        await lock(m, auto_release_seconds=50, **more)
        m.escrow.clock.now += 50
        sent = {"to_agent_id": m.buyer.agent_id, "amount": "0.03"}
        assert (await m.post(referrer, "/transfers", sent)).status_code == 201


async def test_what_time_gave_can_be_withdrawn_at_once(db: str) -> None:
    """I14: the operator pays out what an agent has by now, swept or not."""
    async with market(db) as m:
        name = await lock(m, auto_release_seconds=50)
        m.escrow.clock.now += 50
        async with m.escrow.ledger.write() as tx:
            await agents.withdraw(tx, m.provider.agent_id, to_atomic("9.90"))
        assert await m.balance(m.provider) == "0.00"
        assert (await entries(m, name))[-1][2] is None


async def test_only_parties_and_arbiters_read_what_was_said(db: str) -> None:
    """An arbiter sees the cases of escrows that were disputed, and strangers see none."""
    async with market(db) as m:
        judge, stranger = await arbiter(m), await make_agent(m, "public", "read")
        quiet, loud = await lock(m), await lock(m)
        await done(m, m.buyer, loud, "dispute", reason="late", evidence="a photograph")
        for who, name, status in (
            (m.provider, quiet, 200), (judge, quiet, 404), (stranger, quiet, 404),
            (m.provider, loud, 200), (judge, loud, 200), (stranger, loud, 404),
        ):  # fmt: skip
            answer = await m.get(who, f"/escrow/{name}/disputes")
            assert answer.status_code == status
        (case,) = (await m.get(judge, f"/escrow/{loud}/disputes")).json()["items"]
        assert [said["content"] for said in case["evidence"]] == ["a photograph"]


async def test_an_arbiter_sees_what_there_is_to_judge(db: str) -> None:
    """A case names its parties and milestone, and shows terms, proof and review as parties do."""
    async with market(db) as m:
        judge = await arbiter(m)
        parts = [{"name": "draft", "amount": "4.00"}]
        name = await lock(m, memo="a tale", milestones=parts, review_seconds=600)
        await done(m, m.provider, name, "deliver", milestone="draft", proof="page one")
        await done(m, m.buyer, name, "dispute", milestone="draft", reason="too short")
        (listed,) = (await m.get(judge, "/disputes")).json()["items"]
        (case,) = (await m.get(judge, f"/escrow/{name}/disputes")).json()["items"]
        shown = await m.show(name)
    for found in (listed, case):
        assert found["milestone"] == "draft"
        parties = (m.buyer.agent_id, m.provider.agent_id)
        assert (found["from_agent_id"], found["to_agent_id"]) == parties
    assert case["agreement"] == shown
    assert (shown["memo"], shown["milestones"][0]["proof"]) == ("a tale", "page one")


async def test_a_walk_through_disputes_skips_none(db: str) -> None:
    """Open disputes come by their entry: one opened in the second of a page is on a later one."""
    async with market(db) as m:
        judge = await arbiter(m)
        # Ids are random, so of so many some are smaller than one before.
        names, seen, after = [await lock(m, amount="1") for _ in range(6)], [], {}
        for name in names:
            await done(m, m.buyer, name, "dispute", reason="late")
            if name != names[0]:
                page = (await m.get(judge, "/disputes", limit=1, **after)).json()
                seen += [item["escrow_id"] for item in page["items"]]
                after = {"after": page["next"]}
        assert seen == names[:-1]
