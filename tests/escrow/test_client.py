"""The escrow's client against a real escrow: one story for the sync and the async one."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.escrow.market import Market, market
from tests.escrow.operators import make_agent, make_key, make_tenant
from tests.escrow.speaker import KINDS, Speaker, speaker
from tests.support.escrow import RECEIPT_KEY, SESSION_KEY, START
from x402mw.core.errors import AmountInvalid, EscrowRefused, LocalError
from x402mw.core.keys import public_key
from x402mw.core.outcomes import sign_outcome
from x402mw.core.strict import b64url_decode
from x402mw.core.vouchers import SIGNED_BYTES
from x402mw.escrow.access import ARBITER
from x402mw.escrow.transactions import OPERATOR
from x402mw_client.escrow import EscrowClient
from x402mw_client.manual_operations import performance_share
from x402mw_client.webhooks import Event

pytestmark = pytest.mark.anyio
SESSION_PUBLIC, RECEIPT_PUBLIC = (b64url_decode(key, 32) for key in (SESSION_KEY, RECEIPT_KEY))


@dataclass
class Stage:
    """A buyer and a provider that speak through clients, in a market."""

    m: Market
    kind: str
    buyer: Speaker
    provider: Speaker

    @property
    def to(self) -> str:
        """The provider's id."""
        return self.m.provider.agent_id

    def as_agent(self, agent: Any) -> Any:
        """A client of one more agent."""
        return speaker(self.kind, self.m.escrow.url, agent)


@pytest.fixture(params=KINDS)
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Opens the stage, for a client of each kind."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Stage]:
        async with (
            market(tmp_path) as m,
            speaker(request.param, m.escrow.url, m.buyer) as buyer,
            speaker(request.param, m.escrow.url, m.provider) as provider,
        ):
            yield Stage(m, request.param, buyer, provider)

    return opened


async def refused(call: Any) -> str:
    """The code with which the escrow refuses a call."""
    with pytest.raises(EscrowRefused) as found:
        await call
    return found.value.reason


async def test_lock_release_status_refund(stage: Any) -> None:
    """E20: the four calls of the helper class, by id, by text and by record."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, "10.00", "a report", 48)
        assert (job.kind, job.status, job.on_expiry) == ("manual", "locked", "release")
        assert (job.session_key, job.journal) == (None, None)
        assert job.expires_at == START + 48 * 3600
        assert (await s.buyer.release(job, "2.50")).released == 2_500_000
        assert (await s.buyer.refund(job.escrow_id, "1.50")).refunded == 1_500_000
        shown = await s.buyer.status(job.session)
        assert (shown.remaining, shown.free, shown.memo) == (6_000_000, 6_000_000, "a report")
        ended = await s.buyer.release(job)
        assert (ended.status, ended.released, ended.fee) == ("settled", 8_500_000, 85_000)
        other = await s.buyer.lock(s.to, "1.00")
        assert (await s.buyer.refund(other)).status == "refunded"


async def test_releases_by_total_and_below_a_unit(stage: Any) -> None:
    """X4, M4: a cumulative total, and fractions of a unit that are carried."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, "10.00", expires_in_seconds=3600)
        assert job.on_expiry == "refund"
        assert (await s.buyer.release(job, cumulative="4.00")).released == 4_000_000
        assert (await s.buyer.release(job, cumulative="4.00")).released == 4_000_000
        assert (await s.buyer.release_partial(job, "0.0000015", "tick")).carried_units == "1/2"
        shown = await s.buyer.release_partial(job, "5e-7")
        assert (shown.released, shown.carried_units) == (4_000_002, "0")
        assert (await s.buyer.topup(job, "1.00")).deposit == 11_000_000
        later = await s.buyer.extend(job, 60)
        assert later.expires_at == job.expires_at + 60
        closed = await s.buyer.close(job)
        assert (closed.status, closed.refunded) == ("settled", 6_999_998)


async def test_milestones(stage: Any) -> None:
    """P4: delivered, rejected, delivered again, approved; one paid by its name."""
    async with stage() as s:
        parts = {"spec": "2.50", "draft": "5.00", "final": "2.50"}
        job = await s.buyer.lock(s.to, "10.00", milestones=parts, review_seconds=600)
        assert [(part.name, part.amount) for part in job.milestones] == [
            ("spec", 2_500_000),
            ("draft", 5_000_000),
            ("final", 2_500_000),
        ]
        await s.buyer.release(job, milestone="spec")
        assert (await s.provider.deliver(job, "v1", milestone="draft")).status == "delivered"
        await s.buyer.reject(job, "draft", reason="typos")
        shown = await s.provider.deliver(job, "v2", milestone="draft")
        assert shown.milestones[1].review_until == START + 600
        shown = await s.buyer.approve(job, "draft")
        assert [part.state for part in shown.milestones] == ["paid", "paid", "pending"]
        assert await refused(s.buyer.approve(job, "nope")) == "unknown_milestone"
        assert (await s.provider.close(job)).refunded == 2_500_000
        assert (await s.provider.return_money(job, "0.50")).returned == 500_000


@pytest.mark.parametrize(
    ("amount", "score", "paid"),
    [
        ("1.000001", 0.95, 1_000_001),
        ("1.000001", "0.9", 1_000_001),
        ("1.000001", 0.7, 700_000),
        ("1.000001", "0.69", 0),
        ("10.00", 0.75, 7_000_000),
    ],
)
async def test_pay_by_performance(stage: Any, amount: str, score: Any, paid: int) -> None:
    """P6, X19: the share of the score's tier, rounded down, and the rest home in the same step."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, amount)
        ended = await s.buyer.settle_performance(job, score)
        assert (ended.released, ended.refunded) == (paid, job.deposit - paid)
        assert [line.kind for line in await s.buyer.iter_history(job)] == ["settle", "lock"]
        assert await s.buyer.settle_performance(job, score) == ended


async def test_pay_a_share(stage: Any) -> None:
    """X19: any fraction of what is free; what is disputed is left alone."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, "10.00")
        await s.buyer.dispute(job, "late", amount="4.00")
        shown = await s.buyer.settle_share(job, "1/3")
        assert (shown.released, shown.refunded, shown.remaining) == (
            2_000_000,
            4_000_000,
            4_000_000,
        )
        for share in ("1.1", "-0.1", "x"):
            with pytest.raises(LocalError):
                await s.buyer.settle_share(job, share)
        assert await refused(s.buyer.settle(job, "0.01", "0")) == "not_covered"


async def test_timed_escrow(stage: Any) -> None:
    """C10: two hours at $2.00, and what is left goes to the provider at their end."""
    async with stage() as s:
        job = await s.buyer.create_timed_escrow("4.00", s.to, 2)
        assert (job.deposit, job.on_expiry, job.expires_at) == (4_000_000, "release", START + 7200)
        half = await s.buyer.create_timed_escrow("4.00", s.to, 0.5, memo="half an hour")
        assert half.expires_at == START + 1800
        await s.m.escrow.pass_time(7200)
        ended = await s.buyer.status(job)
        assert (ended.status, ended.close_reason) == ("released", "expired_release")


async def test_disputes(stage: Any) -> None:
    """E15: opened, argued, withdrawn, and decided by an arbiter who finds it in the list."""
    async with stage() as s:
        tenant = await make_tenant(s.m, "court")
        async with s.as_agent(await make_agent(s.m, tenant, ARBITER)) as arbiter:
            job = await s.buyer.lock(s.to, "10.00")
            shown = await s.buyer.dispute(job, "late", amount="6.00", evidence="see the log")
            (listed,) = (await s.buyer.list_escrows()).items
            for record in (shown, listed):
                state = (record.status, record.disputed, record.free)
                assert state == ("disputed", 6_000_000, 4_000_000)
            assert (shown.dispute.opened_by, shown.dispute.amount) == (
                s.m.buyer.agent_id,
                6_000_000,
            )
            await s.provider.add_evidence(job, "it was on time")
            assert (await s.buyer.withdraw_dispute(job)).dispute is None
            await s.provider.dispute(job, "unpaid")
            (found,) = await arbiter.iter_disputes()
            assert (found.escrow, found.reason, found.amount) == (job.session, "unpaid", 10_000_000)
            ended = await arbiter.resolve_dispute(found.escrow, "7.00", "3.00", "most of it came")
            assert (ended.released, ended.refunded) == (7_000_000, 3_000_000)
            assert (await arbiter.list_disputes(limit=1)).items == []
            for reader in (arbiter, s.buyer, s.provider):
                second, first = (await reader.list_cases(job)).items
                assert (second.status, first.status) == ("resolved", "withdrawn")
                assert second.agreement.memo == ended.memo
                assert (first.from_agent_id, first.milestone) == (s.m.buyer.agent_id, None)
                assert [said.content for said in first.evidence] == [
                    "see the log",
                    "it was on time",
                ]


async def test_conditions(stage: Any) -> None:
    """E24: an outcome by its hash, and one that an oracle signed for this very escrow."""
    outcome, seed = "the bridge is open", b"o" * 32
    async with stage() as s:
        digest = hashlib.sha256(outcome.encode()).hexdigest()
        hashed = await s.buyer.lock(s.to, "2.00", outcome_sha256=digest)
        signed = await s.buyer.lock(s.to, "2.00", oracle_key=public_key(seed))
        assert await refused(s.provider.present_outcome(hashed, "no")) == "condition_not_met"
        assert (await s.provider.present_outcome(hashed, outcome)).met
        wrong = sign_outcome(hashed.session, outcome, seed)
        met = s.provider.present_outcome(signed, outcome, signature=wrong)
        assert await refused(met) == "condition_not_met"
        right = sign_outcome(signed.session, outcome, seed)
        assert (await s.provider.present_outcome(signed, outcome, signature=right)).met
        assert (await s.buyer.status(signed)).status == "released"


async def test_shared_revenue(stage: Any) -> None:
    """E23: payees with fractions get their shares of each release."""
    async with stage() as s, s.as_agent(None) as nobody:
        helper = await nobody.register_agent("helper")
        payees = {s.to: "0.7", helper.agent_id: "0.3"}
        job = await s.buyer.lock(s.to, "10.00", payees=payees)
        await s.buyer.release(job)
        assert (await s.provider.me()).balance == 6_930_000


async def test_sessions(stage: Any) -> None:
    """Sessions: opened, topped up, renewed, released by total, redeemed, closed by the provider."""
    async with stage() as s:
        journal = bytes.fromhex(s.m.journal.removeprefix("jr_"))
        wish = {"session_key": SESSION_PUBLIC, "journal": journal}
        opened = await s.buyer.open_session(s.to, "5.00", memo="work", **wish)
        assert (opened.kind, opened.session_key) == ("session", SESSION_PUBLIC)
        assert opened.token
        assert (await s.buyer.topup(opened, "1.00")).deposit == 6_000_000
        assert (await s.buyer.renew_token(opened)).token
        assert (await s.buyer.extend(opened, 60)).expires_at == opened.expires_at + 60
        assert (await s.buyer.release(opened, cumulative="1.00")).released == 1_000_000
        assert await refused(s.buyer.refund(opened)) == "wrong_kind"
        voucher = b64url_decode(s.m.voucher(opened.escrow_id, "2.00"), SIGNED_BYTES)
        ended = await s.provider.close(opened, voucher=voucher, amount="2.00")
        assert (ended.status, ended.redeemed, ended.refunded) == ("settled", 2_000_000, 4_000_000)
        assert (await s.provider.register_journal(journal, RECEIPT_PUBLIC)).journal == journal
        assert (await s.provider.changes(0, journal, 1)).changes[0].session == opened.session


async def test_a_key_of_ones_own(stage: Any) -> None:
    """Money rule 8: the same call under the same key moves money once, another one is refused."""
    async with stage() as s:
        first = await s.buyer.lock(s.to, "5.00", key="order 7")
        assert await s.buyer.lock(s.to, "5.00", key="order 7") == first
        assert await refused(s.buyer.lock(s.to, "6.00", key="order 7")) == "idempotency_mismatch"
        await s.buyer.release(first, "1.00", key="part 1")
        assert (await s.buyer.release(first, "1.00", key="part 1")).released == 1_000_000
        assert (await s.buyer.release(first, "1.00")).released == 2_000_000


async def test_what_cannot_be_meant_is_not_sent(stage: Any) -> None:
    """M1, M2: no floats, no parts of a unit in a lock, no ids that are none; nothing is locked."""
    async with stage() as s:
        for amount in (1.5, "1.0000001", "-1", "NaN", "", True, None, 2**63):
            with pytest.raises(AmountInvalid):
                await s.buyer.lock(s.to, amount)
        for wrong in ("esc_1", "../agents/me", "", "ag_" + "1" * 32):
            with pytest.raises(LocalError):
                await s.buyer.status(wrong)
        for hours in ("0.0001", "many"):
            with pytest.raises(LocalError):
                await s.buyer.lock(s.to, "1.00", auto_hours=hours)
        assert await refused(s.buyer.lock(s.to, "1.00", auto_hours=0)) == "invalid_request"
        assert await refused(s.buyer.lock(s.to, "0.5")) == "below_minimum"
        assert (await s.buyer.me()).balance == 100_000_000


async def test_transfers(stage: Any) -> None:
    """E21: money from agent to agent, as text or units; both find it in their listings."""
    async with stage() as s:
        sent = await s.buyer.transfer(s.to, "0.001", "call 1")
        await s.buyer.transfer(s.to, sent.amount)
        assert await s.provider.get_transfer(sent.transfer_id) == sent
        assert [one.memo for one in await s.provider.iter_transfers(role="recipient")] == [
            "",
            "call 1",
        ]
        assert (await s.provider.list_transfers(role="sender")).items == []
        assert (await s.provider.me()).balance == 2000


async def test_listings_go_on_from_page_to_page(stage: Any) -> None:
    """E8: an iterator ends after the last page, each escrow once, and tells how far it is."""
    async with stage() as s:
        made = [(await s.buyer.lock(s.to, "1.00", str(number))).session for number in range(7)]
        page = await s.buyer.list_escrows(limit=3)
        assert [len(page.items), page.next is None] == [3, False]
        told: list[int] = []
        found = await s.buyer.iter_escrows(role="buyer", page_items=3, progress=told.append)
        assert [record.session for record in found] == made[::-1]
        assert told == [3, 6, 7]
        await s.buyer.release(made[0])
        assert len(await s.provider.iter_escrows(status="released")) == 1
        assert await s.provider.iter_escrows(role="buyer") == []


async def test_history(stage: Any) -> None:
    """E7: what happened, newest first, by whom and how much; pauses are in it."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, "2.00")
        await s.buyer.release(job, "1.00", memo="half")
        assert (await s.provider.pause(job, "waiting")).status == "partially_released"
        await s.provider.resume(job)
        lines = await s.buyer.iter_history(job, page_items=3)
        assert [line.kind for line in lines] == ["resume", "pause", "release", "lock"]
        paid = lines[2]
        assert (paid.released, paid.fee, paid.actor) == (1_000_000, 10_000, s.m.buyer.agent_id)
        assert paid.data["memo"] == "half"
        assert (await s.buyer.list_history(job, limit=1)).items == lines[:1]


async def test_events_as_they_happen(stage: Any) -> None:
    """E18: from the beginning, from an event on, or of one escrow; each event once, in order."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, "2.00", low_balance="1.60")
        await s.buyer.release(job, "0.50")
        other = await s.buyer.lock(s.to, "1.00")
        found = await take(s.provider, 4, since="0")
        assert [(event.type, event.amount) for event in found] == [
            ("locked", 2_000_000),
            ("released", 500_000),
            ("low_balance", 0),
            ("locked", 1_000_000),
        ]
        assert await take(s.provider, 1, since=found[2].id) == found[3:]
        assert (await take(s.buyer, 1, other, since="0")) == found[3:]
        waiting = asyncio.create_task(take(s.provider, 1))
        while waiting not in (await asyncio.wait([waiting], timeout=0.2))[0]:
            await s.buyer.topup(other, "1.00")
        assert (await waiting)[0].type == "topped_up"
        with pytest.raises(LocalError):
            await take(s.buyer, 1, since="now")
        with pytest.raises(EscrowRefused):
            await take(s.buyer, 1, "esc_" + "0" * 32)


async def take(who: Speaker, number: int, *given: Any, **named: Any) -> list[Event]:
    """The first events of a stream, which is then left."""
    client = who.client
    if isinstance(client, EscrowClient):
        events = client.watch(*given, **named)
        return await asyncio.to_thread(lambda: list(islice(events, number)))
    found = []
    async with aclosing(client.watch(*given, **named)) as stream:
        async for event in stream:
            found.append(event)
            if len(found) == number:
                break
    return found


async def test_webhooks(stage: Any) -> None:
    """E18: made, listed, rotated and deleted; each secret is shown once."""
    async with stage() as s:
        job = await s.buyer.lock(s.to, "1.00")
        made = await s.buyer.create_webhook("https://example.com/x", ["released"], escrow=job)
        assert (made.events, made.escrow_id) == (["released"], job.escrow_id)
        turned = await s.buyer.rotate_webhook(made.webhook_id)
        assert turned.secret != made.secret
        assert made.secret not in repr(made)
        assert [hook.webhook_id for hook in (await s.buyer.list_webhooks()).items] == [
            made.webhook_id
        ]
        assert (await s.buyer.list_deliveries(made.webhook_id)).items == []
        assert await s.buyer.iter_deliveries(made.webhook_id, page_items=1) == []
        assert await refused(s.buyer.redeliver(made.webhook_id, "12.1")) == "not_found"
        with pytest.raises(LocalError):
            await s.buyer.redeliver(made.webhook_id, "1/../..")
        await s.buyer.delete_webhook(made.webhook_id)
        assert (await s.buyer.list_webhooks()).items == []


async def test_accounts_and_keys(stage: Any) -> None:
    """E17, E22, L18: an agent with a handle, its faucet, and keys made, rotated and revoked."""
    async with stage() as s, s.as_agent(None) as nobody:
        assert (await nobody.health()).status == "ok"
        assert (await nobody.stats()).min_escrow["live"] == 1_000_000
        new = await nobody.register_agent("ann", handle="ann-1", mode="test")
        assert (new.handle, new.mode, new.api_key[:8]) == ("ann-1", "test", "pf_test_")
        async with s.as_agent(new) as ann:
            assert (await ann.claim_faucet()).balance == 100_000_000
            assert (await ann.find_handle("ann-1")).agent_id == new.agent_id
            assert await refused(ann.find_handle("no/body")) == "not_found"
            reader = await ann.create_api_key("reader", ["read"])
            turned = await ann.rotate_api_key(reader.key_id, 60)
            assert (turned.scopes, turned.replaces) == (["read"], reader.key_id)
            assert (await ann.revoke_api_key(turned.key_id)).revoked_at == START
            assert reader.key_id in [key.key_id for key in (await ann.list_api_keys()).items]
            assert (await ann.me()).keys[0].scopes
            async with s.as_agent(turned) as late:
                assert await refused(late.me()) == "unauthorized"
            assert (await ann.revoke_myself()).agent_id == new.agent_id
            assert await refused(ann.me()) == "unauthorized"


async def test_admins_and_operators(stage: Any) -> None:
    """E25: an admin sees its tenant's agents and escrows; the operator books money once."""
    async with stage() as s:
        tenant = await make_tenant(s.m, "acme")
        member = await make_agent(s.m, tenant, handle="acme-bot")
        banker = await make_agent(s.m, OPERATOR, "admin")
        async with s.as_agent(banker) as bank:
            booked = await bank.book_deposit(member.agent_id, "9.00", "line 1")
            assert (booked.amount, booked.balance) == (9_000_000, 9_000_000)
            again = bank.book_deposit(member.agent_id, "9.00", "line 1")
            assert await refused(again) == "reference_taken"
            assert (
                await bank.book_withdrawal(member.agent_id, "1.00", "line 2")
            ).balance == 8_000_000
            assert await refused(bank.book_fees("1.00", "line 3")) == "not_covered"
        admin = await make_agent(s.m, tenant, "admin")
        async with s.as_agent(member) as bot, s.as_agent(admin) as boss:
            job = await bot.lock(s.to, "2.00")
            assert {agent.handle for agent in await boss.iter_agents()} == {"acme-bot", None}
            (found,) = await boss.iter_agent_escrows(member.agent_id)
            assert (await boss.agent_escrow_status(found)).session == job.session
            hired = await boss.register_agent("hired")
            assert hired.tenant == "acme"
            assert (await boss.revoke_agent(hired.agent_id)).agent_id == hired.agent_id


async def test_a_key_for_reading_moves_nothing(stage: Any) -> None:
    """Scopes: what a key may not do is refused by its name."""
    async with stage() as s, s.as_agent(await make_key(s.m, s.m.buyer, "read")) as reader:
        assert await refused(reader.lock(s.to, "1.00")) == "scope"
        assert await reader.iter_escrows() == []


@pytest.mark.parametrize("score", ["1e100000000", "1e-100000000", "1e1_0000_0000"])
def test_a_score_with_a_giant_exponent_is_refused(score: str) -> None:
    """P6: a score may come from a stranger, so its digits are never expanded without bounds."""
    with pytest.raises(LocalError, match="exponent"):
        performance_share(score)
