"""Manual escrows over HTTP: every way money may take, on both databases."""

import hashlib
from typing import Any

import pytest

from tests.escrow.market import SESSION_KEY, Market, code_of, market
from x402mw.core import ids
from x402mw.core.keys import public_key
from x402mw.core.outcomes import sign_outcome
from x402mw.core.strict import b64url_encode

pytestmark = pytest.mark.anyio


def wish(m: Market, amount: Any = "10.00", **more: Any) -> dict[str, Any]:
    """The body of a plain lock."""
    return {"to_agent_id": m.provider.agent_id, "amount": amount, **more}


async def lock(m: Market, amount: Any = "10.00", **more: Any) -> str:
    """Locks, and returns the id."""
    answer = await m.post(m.buyer, "/escrow", wish(m, amount, **more))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["escrow_id"])


async def done(m: Market, agent: Any, escrow_id: str, what: str, **body: Any) -> dict[str, Any]:
    """Does something that must succeed."""
    answer = await m.post(agent, f"/escrow/{escrow_id}/{what}", body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def refused(m: Market, agent: Any, escrow_id: str, what: str, **body: Any) -> tuple[int, str]:
    """Does something that must be refused."""
    return code_of(await m.post(agent, f"/escrow/{escrow_id}/{what}", body))


async def test_release_by_amount_total_and_all(db: str) -> None:
    """Rule 5: a delta, a cumulative total and the rest; the fee is 1 % of all that was released."""
    async with market(db) as m:
        name = await lock(m)
        assert (await done(m, m.buyer, name, "release", amount="2.50"))["status"] == (
            "partially_released"
        )
        assert (await done(m, m.buyer, name, "release", cumulative="4.00"))["released"] == "4.00"
        assert (await done(m, m.buyer, name, "release", cumulative="3.00"))["released"] == "4.00"
        assert (await done(m, m.buyer, name, "release-partial", amount=1.5))["released"] == "5.50"
        assert await refused(m, m.buyer, name, "release", amount="4.51") == (409, "not_covered")
        assert await refused(m, m.buyer, name, "release-partial") == (422, "invalid_request")
        ended = await done(m, m.buyer, name, "release")
        assert (ended["status"], ended["remaining"], ended["fee"]) == ("released", "0.00", "0.10")
        assert await m.balance(m.provider) == "9.90"
        assert await refused(m, m.buyer, name, "release") == (409, "invalid_state")


async def test_what_was_delivered_is_not_taken_back_alone(db: str) -> None:
    """Rule 4: also after a reject, when the escrow is called locked; the refusal says who can."""
    async with market(db) as m:
        name = await lock(m)
        await done(m, m.provider, name, "deliver")
        await done(m, m.buyer, name, "reject")
        assert (await m.show(name))["status"] == "locked"
        settlement = {"release": "1.00", "refund": "1.00"}
        for what, body in (("refund", {}), ("close", {}), ("settle", settlement)):
            answer = await m.post(m.buyer, f"/escrow/{name}/{what}", body)
            assert code_of(answer) == (409, "invalid_state")
            assert answer.json()["state"] == "delivered"
            assert "the provider's refund, an arbiter or the end" in answer.json()["detail"]


async def test_a_manual_escrow_has_no_session_key(db: str) -> None:
    """API: what an escrow does not have is null wherever it is shown, in both dialects."""
    async with market(db) as m:
        name, session = await lock(m), (await m.open())["escrow_id"]
        for base in ("/api", "/api/v1"):
            url = f"{m.escrow.url}{base}/escrow"
            shown = (await m.http.get(f"{url}/{name}", headers=m.buyer.headers)).json()
            listed = (await m.http.get(url, headers=m.buyer.headers)).json()["items"]
            found = {each["escrow_id"]: each for each in listed}
            for each in (shown, found[name]):
                assert each["session_key"] is each["journal"] is None
            assert found[session]["session_key"] == SESSION_KEY


async def test_fractions_of_a_unit_are_carried(db: str) -> None:
    """M4: a thousand releases of 0.0000137 pay floor(0.0137), nothing more and nothing lost."""
    async with market(db) as m:
        name = await lock(m)
        for _ in range(100):
            last = await done(m, m.buyer, name, "release", amount="0.0000137")
        assert last["released"] == "0.00137"
        assert (await done(m, m.buyer, name, "release", amount="0.0000005"))["released"] == (
            "0.00137"
        )
        shown = await done(m, m.buyer, name, "release", amount=0.0000005)
        assert (shown["released"], shown["carried_units"]) == ("0.001371", "0")


async def test_milestones_are_paid_one_by_one(db: str) -> None:
    """P4: 25/50/25 by name; a rejected delivery comes again; nothing is paid twice."""
    parts = [("spec_approved", "2.50"), ("draft_delivered", "5.00"), ("final_accepted", "2.50")]
    async with market(db) as m:
        name = await lock(m, milestones=[{"name": n, "amount": a} for n, a in parts])
        await done(m, m.buyer, name, "release", milestone="spec_approved")
        assert await refused(m, m.buyer, name, "release", milestone="spec_approved") == (
            409,
            "invalid_state",
        )
        shown = await done(m, m.provider, name, "deliver", milestone="draft_delivered", proof="v1")
        assert shown["status"] == "delivered"
        assert await refused(m, m.buyer, name, "close") == (409, "invalid_state")
        assert await refused(m, m.buyer, name, "refund", amount="5.00") == (409, "not_covered")
        await done(m, m.buyer, name, "reject", milestone="draft_delivered", reason="typos")
        await done(m, m.provider, name, "deliver", milestone="draft_delivered", proof="v2")
        await done(m, m.buyer, name, "approve", milestone="draft_delivered")
        assert await refused(m, m.provider, name, "approve", milestone="final_accepted") == (
            403,
            "not_the_buyer",
        )
        assert await refused(m, m.buyer, name, "approve", milestone="nope") == (
            422,
            "unknown_milestone",
        )
        ended = await done(m, m.buyer, name, "close")
        assert (ended["status"], ended["released"], ended["refunded"]) == (
            "settled",
            "7.50",
            "2.50",
        )
        assert [part["state"] for part in ended["milestones"]] == ["paid", "paid", "pending"]


async def test_a_delivery_nobody_answers_is_paid(db: str) -> None:
    """Rule 5: the review window ends and the part is paid, at its own second."""
    async with market(db) as m:
        name = await lock(m, review_seconds=600, expires_in_seconds=300)
        await done(m, m.provider, name, "deliver", proof="https://example.com/result")
        await m.escrow.skip_time(599)
        assert (await m.show(name))["status"] == "delivered"
        await m.escrow.skip_time(1)
        shown = await m.show(name)
        assert (shown["status"], shown["close_reason"]) == ("released", "release")


async def test_an_outage_takes_nothing_from_either_party(db: str) -> None:
    """T5: what fell due while the escrow was down waits, and can be answered for ten minutes."""
    async with market(db) as m:
        rejected = await lock(m, review_seconds=600)
        await done(m, m.provider, rejected, "deliver", proof="junk")
        digest = hashlib.sha256(b"done").hexdigest()
        earned = await lock(m, expires_in_seconds=600, condition={"sha256": digest})
        silent = await lock(m, expires_in_seconds=600)
        m.escrow.clock.advance(100_000)
        await m.escrow.ledger.sweep()
        await m.escrow.pass_time(599)
        await done(m, m.buyer, rejected, "reject", reason="junk")
        assert (await done(m, m.provider, earned, "condition", outcome="done"))["met"]
        assert (await m.show(silent))["status"] == "locked"
        await m.escrow.pass_time(1)
        states = [(await m.show(name))["status"] for name in (rejected, earned, silent)]
        assert states == ["locked", "released", "refunded"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"auto_release_seconds": 60}, "released"),
        ({"auto_release_hours": 1}, "released"),
        ({"auto_release_hours": 0.5, "on_expiry": "refund"}, "refunded"),
        ({"expires_in_seconds": 60}, "refunded"),
        ({"expires_in_seconds": 60, "on_expiry": "release"}, "released"),
        ({}, "refunded"),
    ],
)
async def test_who_gets_the_rest_at_the_end(db: str, body: dict[str, Any], status: str) -> None:
    """T3, X1, X2: the name of the time says it, unless on_expiry does."""
    async with market(db) as m:
        name = await lock(m, **body)
        shown = await m.show(name)
        await m.escrow.skip_time(shown["expires_at"] - m.escrow.clock.now - 1)
        assert (await m.show(name))["status"] == "locked"
        await m.escrow.skip_time(1)
        assert (await m.show(name))["status"] == status


@pytest.mark.parametrize(
    "body",
    [
        {"auto_release_seconds": 0},
        {"auto_release_hours": 1, "auto_release_seconds": 3600},
        {"auto_release_hours": 0.0001},
        {"amount_usdc": 1},
        {"amount": "0.0000001"},
        {"amount": "0.5"},
        {"milestones": [{"name": "a", "amount": "11"}]},
        {"milestones": [{"name": "a", "amount": "1"}, {"name": "a", "amount": "1"}]},
        {"payees": [{"agent_id": "ag_" + "1" * 32, "fraction": "0.5"}]},
        {"condition": {}},
        {"on_expiry": "both"},
    ],
)
async def test_what_a_lock_refuses(db: str, body: dict[str, Any]) -> None:
    """X1, M4, E12: each mistake is one 422 that names it, and nothing is locked."""
    async with market(db) as m:
        assert code_of(await m.post(m.buyer, "/escrow", wish(m, **body)))[0] == 422
        assert await m.balance(m.buyer) == "100.00"


async def test_a_performance_settlement_is_one_step(db: str) -> None:
    """P6, X19: 70 % to the provider and 30 % home, at once or not at all."""
    async with market(db) as m:
        name = await lock(m)
        assert await refused(m, m.buyer, name, "settle", release="7", refund="3.01") == (
            409,
            "not_covered",
        )
        ended = await done(m, m.buyer, name, "settle", release="7.00", refund="3.00")
        assert (ended["status"], ended["released"], ended["refunded"]) == (
            "settled",
            "7.00",
            "3.00",
        )


async def test_refunds_from_either_side(db: str) -> None:
    """X24: the buyer takes what is free, the provider all that is held, and its own."""
    async with market(db) as m:
        name = await lock(m)
        await done(m, m.buyer, name, "release", amount="4.00")
        await done(m, m.buyer, name, "refund", amount="1.00")
        await done(m, m.provider, name, "deliver", proof="all of it")
        assert await refused(m, m.buyer, name, "refund") == (409, "invalid_state")
        ended = await done(m, m.provider, name, "refund")
        assert (ended["status"], ended["refunded"]) == ("settled", "6.00")
        assert await refused(m, m.buyer, name, "return", amount="1.00") == (403, "not_the_provider")
        assert await refused(m, m.provider, name, "return", amount="4.01") == (409, "not_covered")
        assert (await done(m, m.provider, name, "return", amount="3.00"))["returned"] == "3.00"
        assert await refused(m, m.provider, name, "return", amount="1.00") == (
            409,
            "insufficient_funds",
        )
        assert (await m.balance(m.buyer), await m.balance(m.provider)) == ("99.00", "0.96")


async def test_a_dispute_holds_its_part_and_nothing_else(db: str) -> None:
    """Rule 5: the rest keeps working, a close waits, the opener may withdraw."""
    async with market(db) as m:
        name = await lock(m)
        shown = await done(m, m.buyer, name, "dispute", amount="6.00", reason="late")
        assert (shown["status"], shown["disputed"]) == ("disputed", "6.00")
        assert await refused(m, m.buyer, name, "dispute", reason="again") == (409, "invalid_state")
        assert await refused(m, m.provider, name, "close") == (409, "invalid_state")
        assert await refused(m, m.buyer, name, "release", amount="4.01") == (409, "not_covered")
        await done(m, m.buyer, name, "release", amount="4.00")
        await done(m, m.provider, name, "dispute/evidence", content="it was on time")
        assert await refused(m, m.provider, name, "dispute/withdraw") == (403, "not_the_opener")
        assert (await done(m, m.buyer, name, "dispute/withdraw"))["status"] == "partially_released"
        assert (await done(m, m.buyer, name, "close"))["status"] == "settled"


async def test_a_dispute_is_not_withdrawn_for_ever(db: str) -> None:
    """Rule 4: a dispute stops a review; who took three back over the same thing opens no fourth."""
    async with market(db) as m:
        name = await lock(m)
        for _ in range(3):
            await done(m, m.buyer, name, "dispute", reason="late")
            await done(m, m.buyer, name, "dispute/withdraw")
        again = (409, "withdrawn_too_often")
        assert await refused(m, m.buyer, name, "dispute", reason="late") == again
        assert await refused(m, m.buyer, name, "dispute", amount="10.00", reason="late") == again
        await done(m, m.buyer, name, "dispute", amount="1.00", reason="this much is missing")
        await done(m, m.buyer, name, "dispute/withdraw")
        await done(m, m.provider, name, "dispute", reason="unpaid")


async def test_a_dispute_nobody_decides_ends_by_its_deadline(db: str) -> None:
    """Rule 5: after seven days on_expiry applies to D, recorded as undecided."""
    async with market(db) as m:
        name = await lock(m, auto_release_hours=24)
        await done(m, m.provider, name, "dispute", amount="6.00", reason="unpaid")
        await m.escrow.skip_time(7 * 24 * 3600 - 1)
        assert (await m.show(name))["status"] == "disputed"
        await m.escrow.skip_time(1)
        shown = await m.show(name)
        assert (shown["status"], shown["close_reason"]) == ("released", "undecided")


async def test_revenue_is_split_exactly(db: str) -> None:
    """E23: what the provider earns is shared by the fractions, to the unit."""
    async with market(db) as m:
        body = (await m.http.post("/agents", json={"name": "helper"})).json()
        payees = [
            {"agent_id": m.provider.agent_id, "fraction": "0.7"},
            {"agent_id": body["agent_id"], "fraction": "0.3"},
        ]
        name = await lock(m, payees=payees)
        await done(m, m.buyer, name, "release", amount="0.000011")
        assert await m.balance(m.provider) == "0.000008"
        await done(m, m.buyer, name, "release")
        headers = {"Authorization": f"Bearer {body['api_key']}"}
        helper = (await m.http.get("/agents/me", headers=headers)).json()["balance"]
        assert (await m.balance(m.provider), helper) == ("6.93", "2.97")


async def test_a_condition_pays_who_presents_it(db: str) -> None:
    """E24: a hash fixed at the lock, or an oracle's signature for this very escrow."""
    seed = b"o" * 32
    async with market(db) as m:
        outcome = "the bridge is open"
        digest = hashlib.sha256(outcome.encode()).hexdigest()
        by_hash = await lock(m, condition={"sha256": digest})
        assert await refused(m, m.provider, by_hash, "condition", outcome="it is shut") == (
            409,
            "condition_not_met",
        )
        assert (await done(m, m.provider, by_hash, "condition", outcome=outcome))["met"]
        assert (await m.show(by_hash))["status"] == "released"
        key = b64url_encode(public_key(seed))
        signed, other = [await lock(m, condition={"oracle_key": key}) for _ in range(2)]
        signature = b64url_encode(sign_outcome(ids.parse_id(ids.ESCROW, signed), outcome, seed))
        said = {"outcome": outcome, "signature": signature}
        assert await refused(m, m.provider, other, "condition", **said) == (
            409,
            "condition_not_met",
        )
        assert (await done(m, m.provider, signed, "condition", **said))["met"]


async def test_both_dialects_on_both_paths(db: str) -> None:
    """X6, X7: the first guides' names and numbers work, and under /api they are answered."""
    async with market(db) as m:
        base = m.escrow.url + "/api"
        body = {
            "amount_usdc": 3.7,
            "provider": m.provider.agent_id,
            "description": "inference",
            "auto_release_seconds": 3600,
        }
        made = (await m.http.post(f"{base}/escrow", json=body, headers=m.buyer.headers)).json()
        assert (made["balance_usdc"], made["amount_usdc"], made["provider"]) == (
            3.7,
            3.7,
            m.provider.agent_id,
        )
        path = f"{base}/escrow/{made['escrow_id']}"
        paid = {"amount_usdc": 0.0137, "recipient": m.provider.agent_id, "memo": "batch"}
        answer = await m.http.post(f"{path}/release", json=paid, headers=m.buyer.headers)
        assert '"balance_usdc":3.6863' in answer.text
        wrong = {**paid, "recipient": m.buyer.agent_id}
        answer = await m.http.post(f"{path}/release", json=wrong, headers=m.buyer.headers)
        assert code_of(answer) == (409, "recipient_mismatch")
        listed = (await m.http.get(f"{base}/escrow", headers=m.buyer.headers)).json()
        assert [item["balance_usdc"] for item in listed["items"]] == [3.6863]
        plain = await m.show(made["escrow_id"])
        assert "balance_usdc" not in plain
        assert plain["remaining"] == "3.6863"


async def test_a_session_is_not_paid_by_hand_in_parts(db: str) -> None:
    """Rule 4: what only manual escrows know is refused for a session, and the other way round."""
    async with market(db) as m:
        session = (await m.open())["escrow_id"]
        assert await refused(m, m.buyer, session, "refund") == (409, "wrong_kind")
        assert await refused(m, m.buyer, session, "release", amount="1") == (422, "invalid_request")
        manual = await lock(m)
        assert await refused(m, m.buyer, manual, "token") == (409, "wrong_kind")
        item = {"escrow_id": manual, "amount": "0", "final": True}
        (verdict,) = await m.redeem(item)
        assert verdict["code"] == "unknown_session"


async def test_extensions(db: str) -> None:
    """T4: later, never beyond a year, and not after the end."""
    async with market(db) as m:
        for name in (await lock(m, expires_in_seconds=60), (await m.open())["escrow_id"]):
            before = (await m.show(name))["expires_at"]
            assert (await done(m, m.buyer, name, "extend", seconds=60))["expires_at"] == before + 60
            assert await refused(m, m.buyer, name, "extend", seconds=365 * 86400) == (
                422,
                "invalid_request",
            )


async def newcomer(m: Market, **body: Any) -> dict[str, str]:
    """Registers one more agent; answers its id and the headers it sends."""
    answer = await m.http.post("/agents", json={"name": "newcomer", **body})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    return {"id": made["agent_id"], "Authorization": f"Bearer {made['api_key']}"}


async def balance_of(m: Market, agent: dict[str, str]) -> str:
    """What a newcomer has."""
    headers = {"Authorization": agent["Authorization"]}
    return str((await m.http.get("/agents/me", headers=headers)).json()["balance"])


@pytest.mark.parametrize("parts", [1, 7, 100])
async def test_a_referrer_gets_its_part_however_it_is_split(db: str, parts: int) -> None:
    """E14, rule 3: $1,000 ends as $990 + $8.50 + $1.50, whoever referred by whatever way."""
    async with market(db, balance="1000.00") as m:
        referrer = await newcomer(m, handle="introducer")
        name = await lock(m, "1000.00", referral_code="introducer")
        for part in range(1, parts):
            total = 1_000_000_000 * part // parts
            cumulative = f"{total // 1_000_000}.{total % 1_000_000:06d}"
            await done(m, m.buyer, name, "release", cumulative=cumulative)
        ended = await done(m, m.buyer, name, "release")
        assert (ended["status"], ended["fee"]) == ("released", "10.00")
        assert (await m.balance(m.provider), await balance_of(m, referrer)) == ("990.00", "1.50")


async def test_a_party_is_never_its_own_referrer(db: str) -> None:
    """X21: neither buyer nor provider nor who shares the revenue."""
    async with market(db) as m:
        for party in (m.buyer, m.provider):
            answer = await m.post(m.buyer, "/escrow", wish(m, referral_code=party.agent_id))
            assert code_of(answer) == (422, "self_referral")
        helper = await newcomer(m)
        payees = [
            {"agent_id": m.provider.agent_id, "fraction": "0.5"},
            {"agent_id": helper["id"], "fraction": "0.5"},
        ]
        body = wish(m, payees=payees, referral_code=helper["id"])
        assert code_of(await m.post(m.buyer, "/escrow", body)) == (422, "self_referral")


async def test_a_revoked_buyer_closes_its_sessions(db: str) -> None:
    """Rule 5: revocation starts closing; what was signed before stays redeemable."""
    async with market(db) as m:
        session = (await m.open())["escrow_id"]
        voucher = m.voucher(session, "1.00")
        answer = await m.post(m.buyer, "/agents/me/revoke", {})
        assert (answer.status_code, answer.json()["sessions_closing"]) == (200, 1)
        assert (await m.get(m.buyer, "/agents/me")).status_code == 401
        (verdict,) = await m.redeem({"voucher": voucher, "amount": "1.00"})
        assert (verdict["ok"], verdict["state"]) == (True, "closing")
        for _ in range(20):
            m.escrow.clock.now += 50
            await m.redeem()
        answer = await m.get(m.provider, f"/escrow/{session}")
        ended = answer.json()
        assert (ended["status"], ended["close_reason"]) == ("settled", "revoked")


async def test_the_dialect_in_transfers_and_cases(db: str) -> None:
    """Dialects: a transfer takes the other names; the escrow inside a case has them under /api."""
    async with market(db) as m:
        body = {"recipient": m.provider.agent_id, "amount_usdc": 1.5, "description": "thanks"}
        for path in ("/transfers", f"{m.escrow.url}/api/transfers"):
            told = (await m.post(m.buyer, path, body)).json()
            assert (told["amount"], told["memo"]) == ("1.50", "thanks")
        finer = {"to_agent_id": m.provider.agent_id, "amount": "0.0000001"}
        assert code_of(await m.post(m.buyer, "/transfers", finer)) == (422, "invalid_request")
        name = await lock(m)
        await done(m, m.buyer, name, "dispute", reason="late")
        cases = [
            (await m.get(m.buyer, f"{m.escrow.url}{base}/escrow/{name}/disputes")).json()
            for base in ("/api", "/api/v1")
        ]
        agreements = [case["items"][0].pop("agreement") for case in cases]
        assert cases[0] == cases[1]
        assert agreements[0] == {**agreements[0], **agreements[1]}
        assert (agreements[0]["balance_usdc"], "balance_usdc" in agreements[1]) == (10, False)


async def test_what_people_say_may_have_lines(db: str) -> None:
    """API: line breaks in proofs, reasons and evidence come back as they went in; nothing else."""
    async with market(db) as m:
        name = await lock(m)
        text = "first\n\nsecond"
        told = await done(m, m.provider, name, "deliver", proof=text)
        assert told["delivery"]["proof"] == text
        await done(m, m.buyer, name, "dispute", reason=text, evidence=text)
        await done(m, m.provider, name, "dispute/evidence", content=text)
        case = (await m.get(m.buyer, f"/escrow/{name}/disputes")).json()["items"][0]
        assert case["reason"] == text
        assert [said["content"] for said in case["evidence"]] == [text, text]
        for wrong in ("a\rb", "a\tb", "a\x00b", "a\u2028b"):
            answer = await refused(m, m.buyer, name, "dispute/evidence", content=wrong)
            assert answer == (422, "invalid_request")
        assert code_of(await m.post(m.buyer, "/escrow", wish(m, memo=text)))[0] == 422
