"""Redemption: batches of vouchers, judged one by one, applied together."""

import pytest

from tests.escrow.market import JOURNAL, code_of, make_voucher, market
from x402mw.core.vouchers import network_id

pytestmark = pytest.mark.anyio


async def test_what_was_charged_is_paid_not_what_was_signed(db: str) -> None:
    """Rule 4: R := max(R, min(y, cumulative, L)); items above voucher or deposit are clamped."""
    async with market(db) as m:
        name = (await m.open("5.00"))["escrow_id"]
        for cumulative, amount, redeemed in (
            ("2.00", "0.50", "0.50"),
            ("2.00", "0.40", "0.50"),
            ("2.00", "3.00", "2.00"),
            ("9.00", "8.00", "5.00"),
            ("9.00", "1e-7", "5.00"),
        ):
            item = {"voucher": m.voucher(name, cumulative), "amount": amount}
            (verdict,) = await m.redeem(item)
            assert (verdict["ok"], verdict["redeemed"]) == (True, redeemed)
        assert await m.balance(m.provider) == "4.95"


async def test_a_buyers_release_and_vouchers_move_one_counter(db: str) -> None:
    """Rule 4: the same work is never paid twice; redeemed is kept apart from released."""
    async with market(db) as m:
        name = (await m.open("5.00"))["escrow_id"]
        await m.post(m.buyer, f"/escrow/{name}/release", {"cumulative": "3.00"})
        (verdict,) = await m.redeem({"voucher": m.voucher(name, "2"), "amount": "2"})
        assert (verdict["redeemed"], verdict["released"]) == ("2.00", "3.00")
        assert await m.balance(m.provider) == "2.97"


async def test_one_session_many_times_in_a_batch(db: str) -> None:
    """Rule 4: duplicates of a session count as one; the largest wins, each gets its verdict."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        items = [
            {"voucher": m.voucher(name, "3"), "amount": amount, "final": amount == "1"}
            for amount in ("1", "3", "2", "3")
        ]
        verdicts = await m.redeem(*items)
        assert [item["redeemed"] for item in verdicts] == ["3.00"] * 4
        assert {item["state"] for item in verdicts} == {"settled"}
        assert await m.balance(m.provider) == "2.97"
        assert await m.balance(m.buyer) == "97.00"


async def test_one_poison_item_never_blocks_the_rest(db: str) -> None:
    """Rule 4: every wrong item has its own code; the good ones are paid all the same."""
    async with market(db) as m:
        mine, ended = (await m.open())["escrow_id"], (await m.open())["escrow_id"]
        await m.post(m.provider, f"/escrow/{ended}/close")
        elsewhere = make_voucher(network_id("escrow:other", b"k" * 32), mine, "1")
        flipped = m.voucher(mine, "1")
        flipped = flipped[:-10] + ("A" if flipped[-10] != "A" else "B") + flipped[-9:]
        items = [
            ({"voucher": "junk", "amount": "1"}, "malformed"),
            ({"voucher": elsewhere, "amount": "1"}, "wrong_network"),
            ({"voucher": m.voucher("esc_" + "0" * 32, "1"), "amount": "1"}, "unknown_session"),
            ({"voucher": m.voucher(mine, "1", seed=b"x" * 32), "amount": "1"}, "signature"),
            ({"voucher": flipped, "amount": "1"}, "signature"),
            ({"voucher": m.voucher(ended, "1"), "amount": "1"}, "invalid_state"),
            ({"escrow_id": mine, "amount": "1", "final": True}, "voucher_required"),
            ({"escrow_id": mine, "amount": "0"}, "voucher_required"),
            ({"amount": "0", "final": True}, "voucher_required"),
            ({"voucher": m.voucher(mine, "1"), "amount": "1", "escrow_id": ended}, "malformed"),
            ({"voucher": m.voucher(mine, "1"), "amount": "1"}, None),
        ]
        verdicts = await m.redeem(*(item for item, _ in items))
        assert [item.get("code") for item in verdicts] == [code for _, code in items]
        assert all({"ok", "code", "detail"} == item.keys() for item in verdicts if not item["ok"])
        assert verdicts[-1]["redeemed"] == "1.00"


async def test_only_the_provider_of_a_session_redeems_it(db: str) -> None:
    """Rule 4: a good voucher in other hands, the buyer's included, is an unknown session."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        for number, agent in enumerate((m.buyer, await m.escrow.new_agent("thief"))):
            journal = f"jr_{number:032x}"
            key = {"receipt_key": (await m.show(name))["session_key"]}
            await m.http.put(f"/journals/{journal}", json=key, headers=agent.headers)
            item = {"voucher": m.voucher(name, "1"), "amount": "1"}
            body = {"journal": journal, "serial": 1, "items": [item]}
            answer = (await m.post(agent, "/redeem", body)).json()
            assert answer["items"][0]["code"] == "unknown_session"
        assert await m.balance(m.provider) == "0.00"


async def test_a_final_item_closes_at_once(db: str) -> None:
    """Rule 5: final refunds the rest in the same transaction, from open and from closing."""
    async with market(db) as m:
        first, second, third = [(await m.open())["escrow_id"] for _ in range(3)]
        await m.post(m.buyer, f"/escrow/{second}/close")
        verdicts = await m.redeem(
            {"voucher": m.voucher(first, "2"), "amount": "1.5", "final": True},
            {"voucher": m.voucher(second, "5"), "amount": "5", "final": True},
            {"escrow_id": third, "amount": "0", "final": True},
        )
        assert [item["state"] for item in verdicts] == ["settled", "released", "refunded"]
        assert await m.balance(m.buyer) == "93.50"
        assert (await m.show(second))["close_reason"] == "provider_close"


async def test_repeating_a_final_redemption_is_done_not_failed(db: str) -> None:
    """I11: what an ended session already paid is ok again, more is not."""
    async with market(db) as m:
        name = (await m.open())["escrow_id"]
        final = {"voucher": m.voucher(name, "2"), "amount": "2", "final": True}
        first = await m.redeem(final)
        assert await m.redeem(final) == first
        assert await m.redeem({**final, "amount": "1", "final": False}) == first
        (more,) = await m.redeem({"voucher": m.voucher(name, "3"), "amount": "3"})
        assert (more["ok"], more["code"]) == (False, "invalid_state")


async def test_a_full_batch(db: str) -> None:
    """Contract: 1000 items in one call, many sessions, applied as sets."""
    async with market(db, balance="1000.00") as m:
        names = [(await m.open("1.00"))["escrow_id"] for _ in range(20)]
        items = [
            {"voucher": m.voucher(name, "1"), "amount": f"0.{cents:02}"}
            for cents in range(1, 51)
            for name in names
        ]
        verdicts = await m.redeem(*items)
        assert len(verdicts) == 1000
        assert {item["redeemed"] for item in verdicts} == {"0.50"}
        assert await m.balance(m.provider) == "9.90"
        assert (await m.escrow.check()) == []


async def test_a_batch_for_an_unknown_journal(db: str) -> None:
    """Contract: the journal of a batch must be the caller's own."""
    async with market(db) as m:
        body = {"journal": "jr_" + "f" * 32, "serial": 1, "items": []}
        assert code_of(await m.post(m.provider, "/redeem", body)) == (404, "not_found")
        body["journal"] = JOURNAL
        assert (await m.post(m.provider, "/redeem", body)).json() == {"serial": 0, "items": []}
