"""Money outside of escrows: transfers, the operator's bookings, test money, referrers, figures."""

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import select

from tests.escrow.market import Market, code_of, market
from tests.escrow.operators import furnish, make_agent
from tests.support.escrow import RECEIPT_KEY, Agent, reading
from x402mw.core.amounts import AMOUNT_MAX, Atomic, display, to_atomic
from x402mw.escrow import banking, modes, referrals, schema
from x402mw.escrow.errors import Refused
from x402mw.escrow.rows import balance_of
from x402mw.escrow.statement import draw_up
from x402mw.escrow.stats import coarse
from x402mw.escrow.transactions import OPERATOR

pytestmark = pytest.mark.anyio
NOBODY = "ag_" + "0" * 32


async def pay(m: Market, sender: Agent, amount: str, to: str | None = None, **more: Any) -> Any:
    """Sends a transfer to the provider, or another."""
    key = more.pop("key", None)
    body = {"to_agent_id": to or m.provider.agent_id, "amount": amount, **more}
    return await m.post(sender, "/transfers", body, key=key)


async def join(m: Market, **wish: Any) -> Agent:
    """Registers an agent with these wishes."""
    answer = await m.post(None, "/agents", {"name": "a", **wish})
    assert answer.status_code == 201, answer.text
    return Agent(answer.json()["agent_id"], answer.json()["api_key"])


# Transfers.


async def test_a_transfer_costs_no_fee_and_moves_once(db: str) -> None:
    """E21: pay-per-call moves exactly its amount; the same key moves it once."""
    async with market(db) as m:
        first = await pay(m, m.buyer, "0.001", memo="call 7", key="k")
        assert first.status_code == 201
        again = await pay(m, m.buyer, "0.001", memo="call 7", key="k")
        assert again.json() == first.json()
        assert again.headers["idempotent-replayed"] == "true"
        assert (await m.balance(m.buyer), await m.balance(m.provider)) == ("99.999", "0.001")
        body = first.json()
        for agent in (m.buyer, m.provider):
            assert (await m.get(agent, f"/transfers/{body['transfer_id']}")).json() == body
        assert (body["from_agent_id"], body["memo"]) == (m.buyer.agent_id, "call 7")
        stranger = await m.escrow.new_agent()
        hidden = await m.get(stranger, f"/transfers/{body['transfer_id']}")
        assert code_of(hidden) == (404, "not_found")


async def test_transfers_are_listed_for_both_parties(db: str) -> None:
    """E21: keyset pages, newest first, by role; each transfer once."""
    async with market(db) as m:
        sent = [(await pay(m, m.buyer, "1.00")).json()["transfer_id"] for _ in range(5)]
        back = await pay(m, m.provider, "2.00", to=m.buyer.agent_id)
        every = [*sent, back.json()["transfer_id"]][::-1]
        seen, after = [], None
        while True:
            page = await m.get(
                m.buyer, "/transfers", limit=2, **({"after": after} if after else {})
            )
            seen += [item["transfer_id"] for item in page.json()["items"]]
            if (after := page.json()["next"]) is None:
                break
        assert seen == every
        mine = (await m.get(m.provider, "/transfers", role="recipient")).json()["items"]
        assert [item["transfer_id"] for item in mine] == sent[::-1]
        assert code_of(await m.get(m.buyer, "/transfers", role="buyer"))[0] == 422


async def test_a_transfer_is_refused_for_every_reason_it_has(db: str) -> None:
    """E21 and I10: a refused transfer moves nothing."""
    async with market(db) as m:
        test = await join(m, mode="test")
        for refusal, answer in (
            ((409, "insufficient_funds"), await pay(m, m.buyer, "100.000001")),
            ((422, "self_payment"), await pay(m, m.buyer, "1", to=m.buyer.agent_id)),
            ((404, "unknown_agent"), await pay(m, m.buyer, "1", to=NOBODY)),
            ((404, "unknown_agent"), await pay(m, m.buyer, "1", to=test.agent_id)),
            ((422, "invalid_request"), await pay(m, m.buyer, "0")),
            ((422, "invalid_request"), await pay(m, m.buyer, "-1")),
            ((422, "invalid_request"), await pay(m, m.buyer, "0.0000001")),
            ((422, "invalid_request"), await pay(m, m.buyer, "1", memo="x" * 501)),
            ((422, "invalid_request"), await pay(m, m.buyer, "1", memo="a\nb")),
            ((422, "invalid_request"), await pay(m, m.buyer, "1", fee="0")),
        ):
            assert code_of(answer) == refusal
        assert await m.balance(m.buyer) == "100.00"


async def test_many_transfers_never_overdraw(db: str) -> None:
    """I12: of transfers at once that together exceed the balance, only what it covers moves."""
    async with market(db) as m:
        answers = await asyncio.gather(*(pay(m, m.buyer, "30.00") for _ in range(12)))
        assert sorted(answer.status_code for answer in answers) == [201] * 3 + [409] * 9
        assert await m.balance(m.buyer) == "10.00"


# The operator.


async def booked(m: Market, operator: Agent, kind: str, amount: str, reference: str) -> Any:
    """Books a line for the buyer."""
    body = {"agent_id": m.buyer.agent_id, "amount": amount, "reference": reference}
    return await m.post(operator, f"/operator/{kind}", body)


async def test_the_operator_books_each_line_once(db: str) -> None:
    """Accounts: one reference is booked once, whatever it says the second time, also at once."""
    async with market(db) as m:
        operator = await make_agent(m, "operator", "admin")
        answers = await asyncio.gather(
            *(booked(m, operator, "deposits", "5.00", "line-1") for _ in range(6))
        )
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 5
        again = await booked(m, operator, "withdrawals", "7.00", "line-1")
        assert code_of(again) == (409, "reference_taken")
        assert await m.balance(m.buyer) == "105.00"
        paid = await booked(m, operator, "withdrawals", "105.00", "line-2")
        assert paid.json()["balance"] == "0.00"


async def test_each_booking_says_who_and_which_line(db: str) -> None:
    """L7: the books name the clerk who booked a line, and the line; so does a command's entry."""
    async with market(db) as m:
        clerk = await make_agent(m, "operator", "admin")
        for kind in ("deposits", "withdrawals"):
            assert (await booked(m, clerk, kind, "5.00", kind)).status_code == 201
        async with m.escrow.ledger.write() as tx:
            await banking.book(tx, OPERATOR, "deposit", m.buyer.agent_id, Atomic(1), "by hand")
        async with reading(m.escrow.ledger) as connection:
            query = "SELECT kind, actor, data FROM entries WHERE data IS NOT NULL ORDER BY seq"
            told = [tuple(row) for row in await connection.exec_driver_sql(query)]
        assert told[-3:] == [
            ("deposit", clerk.agent_id, '{"reference":"deposits"}'),
            ("withdrawal", clerk.agent_id, '{"reference":"withdrawals"}'),
            ("deposit", OPERATOR, '{"reference":"by hand"}'),
        ]


async def test_a_withdrawal_never_takes_what_is_not_there(db: str) -> None:
    """I3: nothing goes below zero, whatever comes at once; a refused line can be booked later."""
    async with market(db) as m:
        operator = await make_agent(m, "operator", "admin")
        await m.open("40.00")
        answers = await asyncio.gather(
            *(booked(m, operator, "withdrawals", "25.00", f"w{number}") for number in range(6))
        )
        assert sorted(answer.status_code for answer in answers) == [201] * 2 + [409] * 4
        assert await m.balance(m.buyer) == "10.00"
        refused = await booked(m, operator, "withdrawals", "10.000001", "w9")
        assert code_of(refused) == (409, "insufficient_funds")
        assert (await booked(m, operator, "withdrawals", "10.00", "w9")).status_code == 201


async def test_only_the_operator_books(db: str) -> None:
    """Security: an admin of any other tenant books nothing, also not for its own agents."""
    async with market(db) as m:
        ours = await furnish(m, "ours")
        for kind in ("deposits", "withdrawals"):
            body = {"agent_id": ours.member.agent_id, "amount": "5.00", "reference": "x"}
            answer = await m.post(ours.admin, f"/operator/{kind}", body)
            assert code_of(answer) == (403, "not_the_operator")
            assert code_of(await m.post(m.buyer, f"/operator/{kind}", body)) == (403, "scope")
        operator = await make_agent(m, "operator", "admin")
        body = {"agent_id": NOBODY, "amount": "5.00", "reference": "x"}
        answer = await m.post(operator, "/operator/deposits", body)
        assert code_of(answer) == (404, "unknown_agent")
        too_much = await booked(m, operator, "deposits", display(AMOUNT_MAX), "y")
        assert code_of(too_much) == (409, "amount_out_of_range")


async def test_the_operator_books_its_fees_out(db: str) -> None:
    """Accounts: fees go to the world exactly, each line once, never more than there are; proven."""
    async with market(db) as m:
        operator = await make_agent(m, "operator", "admin")
        name = (await m.open("10.00"))["escrow_id"]
        item = {"voucher": m.voucher(name, "10.00"), "amount": "10.00", "final": True}
        assert (await m.redeem(item))[0]["released"] == "10.00"

        async def take(amount: str, reference: str) -> Any:
            body = {"amount": amount, "reference": reference}
            return await m.post(operator, "/operator/fees", body)

        too_much = await take("0.100001", "f1")
        assert code_of(too_much) == (409, "not_covered")
        assert too_much.json()["available"] == "0.10"
        answers = await asyncio.gather(*(take("0.06", f"f{number}") for number in range(4)))
        assert sorted(answer.status_code for answer in answers) == [201] + [409] * 3
        (taken,) = [answer.json() for answer in answers if answer.status_code == 201]
        assert (taken["kind"], taken["agent_id"], taken["balance"]) == ("fees", None, "0.04")
        again = await asyncio.gather(*(take("0.01", taken["reference"]) for _ in range(3)))
        assert {code_of(answer) for answer in again} == {(409, "reference_taken")}
        assert code_of(await booked(m, operator, "deposits", "1", taken["reference"]))[0] == 409
        assert (await take("0.04", "rest")).json()["balance"] == "0.00"
        assert code_of(await take("0", "none"))[0] == 422
        for agent, code in (
            (m.buyer, "scope"),
            ((await furnish(m, "theirs")).admin, "not_the_operator"),
        ):
            body = {"amount": "0.01", "reference": "y"}
            assert code_of(await m.post(agent, "/operator/fees", body)) == (403, code)
        async with reading(m.escrow.ledger) as connection:
            held = [await balance_of(connection, name) for name in ("house:fees", "world")]
            entries = schema.entries.c
            query = select(entries.actor, entries.data).where(entries.kind == "fees")
            said = (await connection.execute(query.order_by(entries.seq))).all()
        assert held == [0, -to_atomic("149.90")]
        assert [row.actor for row in said] == [operator.agent_id] * 2
        assert [json.loads(row.data)["reference"] for row in said] == [taken["reference"], "rest"]


# Test money.


async def test_test_money_trades_like_live_money(db: str) -> None:
    """E25, E16, X8: a test agent claims more, locks as little as it likes, and pays the fee."""
    async with market(db) as m:
        buyer, provider = await join(m, mode="test"), await join(m, mode="test")
        assert buyer.api_key.startswith("pf_test_")
        claimed = await m.post(buyer, "/faucet/claim")
        assert claimed.json() == {"claimed": "100.00", "balance": "100.00"}
        journal = "jr_" + "7" * 32
        await m.http.put(
            f"/journals/{journal}", json={"receipt_key": RECEIPT_KEY}, headers=provider.headers
        )
        wish = m.wish("0.50", to_agent_id=provider.agent_id, journal=journal)
        escrow = (await m.post(buyer, "/escrow", wish)).json()
        assert (escrow["asset"], escrow["mode"]) == ("USDC", "test")
        assert (await m.open_token(escrow["token"])).asset == "USDC"
        paid = await m.post(buyer, f"/escrow/{escrow['escrow_id']}/release", {"cumulative": "0.50"})
        assert paid.json()["status"] == "partially_released"
        assert (await m.balance(buyer), await m.balance(provider)) == ("99.50", "0.495")
        async with reading(m.escrow.ledger) as connection:
            fees = [
                await balance_of(connection, modes.house(asset)) for asset in ("USDC", "USDC:test")
            ]
        assert fees == [0, 5000]


async def test_live_and_test_never_mix(db: str) -> None:
    """E25: no lock, transfer or referral crosses modes; the other mode's agents do not exist."""
    async with market(db) as m:
        test = await join(m, mode="test")
        await m.post(test, "/faucet/claim")
        lock = await m.post(test, "/escrow", m.wish("1.00"))
        assert code_of(lock) == (404, "unknown_agent")
        assert code_of(await pay(m, test, "1.00")) == (404, "unknown_agent")
        referred = {"name": "a", "referral_code": test.agent_id}
        answer = await m.post(None, "/agents", referred)
        assert code_of(answer) == (404, "unknown_referral_code")
        operator = await make_agent(m, "operator", "admin")
        body = {"agent_id": test.agent_id, "amount": "5.00", "reference": "t"}
        booked = await m.post(operator, "/operator/deposits", body)
        assert booked.json()["balance"] == "105.00"
        async with reading(m.escrow.ledger) as connection:
            worlds = [await balance_of(connection, modes.world(f"USDC{t}")) for t in ("", ":test")]
        assert worlds == [-to_atomic("100.00"), -to_atomic("10005.00")]


async def test_the_faucets_of_both_modes_have_their_own_day(db: str) -> None:
    """E16: the ceiling of a day counts claims of one mode; test money uses up no live money."""
    limits = {"faucet_daily": to_atomic("1.00"), "test_faucet_daily": to_atomic("200.00")}
    async with market(db, **limits) as m:
        statuses = []
        for mode in ("test", "live", "test", "test", "live"):
            agent = await join(m, mode=mode)
            statuses.append((await m.post(agent, "/faucet/claim")).status_code)
        assert statuses == [200, 200, 200, 429, 429]


async def test_the_judge_sees_money_that_crossed(db: str) -> None:
    """E25, I1: were money ever moved between modes, the check of the books would say so."""
    from x402mw.escrow.books import Judge

    judge = Judge({"world": -5, "world:test": 5}, {"world": "USDC", "world:test": "USDC:test"})
    said = list(judge.see_all_entries(0, "0" * 64))
    assert [line for line in said if line.startswith("I1 ")] == [
        "I1 the balances of USDC sum to -5, not to 0",
        "I1 the balances of USDC:test sum to 5, not to 0",
    ]


# Referrers.


async def referrer(m: Market, code: str | None, buyer: Agent, provider: Agent) -> str:
    """Who would get a part of the fee."""
    async with m.escrow.ledger.write() as tx:
        return await referrals.referrer_of(tx, code, buyer.agent_id, provider.agent_id)


async def test_who_is_the_referrer(db: str) -> None:
    """X21: an explicit code, else the buyer's referrer, else the provider's; never a party."""
    async with market(db) as m:
        ann = await join(m, handle="ann")
        bob = await join(m)
        buyer = await join(m, referral_code="ann")
        provider = await join(m, referral_code=bob.agent_id)
        plain = m.buyer
        assert await referrer(m, None, buyer, provider) == ann.agent_id
        assert await referrer(m, None, plain, provider) == bob.agent_id
        assert await referrer(m, None, plain, m.provider) == ""
        assert await referrer(m, "ann", plain, provider) == ann.agent_id
        assert await referrer(m, bob.agent_id, buyer, m.provider) == bob.agent_id
        assert await referrer(m, None, buyer, ann) == "", "the buyer's referrer is a party"
        assert await referrer(m, None, bob, provider) == "", "the provider's referrer is a party"
        for code, said in (("ann", "self_referral"), ("nobody", "unknown_referral_code")):
            with pytest.raises(Refused) as refused:
                await referrer(m, code, ann, provider)
            assert refused.value.reason == said
        await m.post(ann, "/agents/me/revoke")
        assert await referrer(m, None, buyer, provider) == bob.agent_id


async def test_a_handle_refers_within_its_tenant(db: str) -> None:
    """L18: another tenant's handle is no referral code here, its agent's id is."""
    async with market(db) as m:
        theirs = await furnish(m, "theirs")
        wish = {"name": "a", "referral_code": theirs.handle}
        refused = await m.post(None, "/agents", wish)
        assert code_of(refused) == (404, "unknown_referral_code")
        assert (await join(m, referral_code=theirs.member.agent_id)).agent_id
        for code in ("AG_1", "ag_" + "G" * 32, "", "x" * 41, 7):
            answer = await m.post(None, "/agents", {"name": "a", "referral_code": code})
            assert code_of(answer) == (422, "invalid_request")


# Figures.


async def test_public_figures_are_coarse_and_seldom_made(db: str) -> None:
    """Accounts: figures need no key, tell no single agent, escrow or amount, and hold an hour."""
    async with market(db) as m:
        first = (await m.get(None, "/stats")).json()
        assert (first["agents"], first["released"]) == (0, 0)
        assert first["faucet"] == {"live": "1.00", "test": "100.00"}
        for _ in range(14):
            name = (await m.open("4.00"))["escrow_id"]
            await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "3.99"})
            await m.escrow.new_agent()
        assert (await m.get(m.buyer, "/stats")).json() == first
        await m.escrow.pass_time(3600)
        later = (await m.get(None, "/stats")).json()
        assert (later["agents"], later["escrows"]) == (10, {"open": 10, "ended": 0})
        assert later["released"] == 50
        assert later["counted_at"] == 1_800_003_600


async def test_figures_outgrow_an_integer(db: str) -> None:
    """C2: money that turns over often sums to more than 2^63, and is still counted to the unit."""
    async with market(db, balance="9000000000000.00") as m:
        body = {"to_agent_id": m.provider.agent_id, "amount": "8000000000000.00"}
        back = {"to_agent_id": m.buyer.agent_id, "amount": "7900000000000.00"}
        for _ in range(2):
            name = (await m.post(m.buyer, "/escrow", body)).json()["escrow_id"]
            assert (await m.post(m.buyer, f"/escrow/{name}/release", {})).status_code == 200
            assert (await m.post(m.provider, "/transfers", back)).status_code == 201
        for _ in range(8):
            await m.open("1.00")
        assert (await m.get(None, "/stats")).json()["released"] == 10_000_000_000_000
        statement = await draw_up(m.escrow.settings.database_url)
    (manual,) = [one for one in statement.escrows if one.kind == "manual"]
    assert manual.released == 16_000_000_000_000 * 10**6 > AMOUNT_MAX


@pytest.mark.parametrize(
    ("number", "shown"), [(0, 0), (9, 0), (10, 10), (99, 90), (100, 100), (2999, 2000)]
)
def test_a_figure_tells_one_digit(number: int, shown: int) -> None:
    """Accounts: figures are rounded down to one digit that counts, below ten to nothing."""
    assert coarse(number) == shown
