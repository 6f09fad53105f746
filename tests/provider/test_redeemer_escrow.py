"""The redeemer against a real escrow, over real sockets."""

import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.provider.journals import admit, admitted, claim_of
from tests.support.escrow import MovingClock, RunningEscrow, running_escrow
from tests.support.payments import BUYER, BUYER_KEY, QUOTE, Payment
from x402mw.core.amounts import Atomic, to_atomic
from x402mw.core.gate import Claim, Refused
from x402mw.core.sessions import SessionState
from x402mw.provider.journal import Journal
from x402mw.provider.link import EscrowLink
from x402mw.provider.redeemer import Redeemer
from x402mw_client.escrow import AsyncEscrowClient
from x402mw_client.records import EscrowRecord

pytestmark = pytest.mark.anyio

SEQS = itertools.count(1)


@dataclass
class Shop:
    """A provider as far as redeeming is concerned, and a buyer with money."""

    journal: Journal
    link: EscrowLink
    redeemer: Redeemer
    buyer: AsyncEscrowClient

    async def open_session(self, amount: str = "1.00") -> EscrowRecord:
        """The buyer locks money for the shop's journal."""
        return await self.buyer.open_session(
            self.link.pay_to,
            to_atomic(amount),
            session_key=BUYER_KEY,
            journal=self.journal.journal_id,
        )

    def claim(self, record: EscrowRecord, cumulative: int = 1_000_000) -> Claim:
        """A signed call of 1000 on a session."""
        assert record.token is not None
        token = self.link.open_token(record.token)
        terms = replace(QUOTE, network_id=self.link.network_id, journal=self.journal.journal_id)
        payment = Payment(
            terms=terms,
            token=token,
            network_id=self.link.network_id,
            session=record.session,
            seq=next(SEQS),
            cumulative=cumulative,
            key=BUYER,
        )
        return claim_of(payment)

    async def sell(self, record: EscrowRecord, calls: int = 1) -> None:
        """Charges some calls."""
        for _ in range(calls):
            call = await admitted(self.journal, self.claim(record))
            await self.journal.settle(call, used=0, outcome=None)


@asynccontextmanager
async def shop_at(escrow: RunningEscrow, path: Path, keys: tuple[str, str]) -> AsyncIterator[Shop]:
    """Opens the shop; its redeemer's task is not started. `keys`: the provider's, the buyer's."""
    journal = Journal.open(str(path), clock=escrow.clock)
    link = EscrowLink(journal, AsyncEscrowClient(escrow.url, keys[0]), clock=escrow.clock)
    buyer = AsyncEscrowClient(escrow.url, keys[1])
    try:
        await link.start()
        yield Shop(journal, link, Redeemer(journal, link, contact_seconds=0), buyer)
    finally:
        await buyer.aclose()
        await link.stop()
        journal.close()


@pytest.fixture
async def escrow(tmp_path: Path) -> AsyncIterator[RunningEscrow]:
    """A real escrow; at the end its books must balance."""
    async with running_escrow(tmp_path, MovingClock()) as running:
        yield running


@pytest.fixture
async def keys(escrow: RunningEscrow) -> tuple[str, str]:
    """The API keys of a provider, and of a buyer with 10.00."""
    provider = await escrow.new_agent("provider")
    buyer = await escrow.new_agent("buyer", balance="10.00")
    return provider.api_key, buyer.api_key


async def test_redeem_and_close(
    escrow: RunningEscrow, keys: tuple[str, str], tmp_path: Path
) -> None:
    """Charges are redeemed to the unit, a close pays the rest back, and repeats change nothing."""
    async with shop_at(escrow, tmp_path / "journal.db", keys) as shop:
        record = await shop.open_session()
        await shop.redeemer.contact()
        assert not shop.link.away
        assert not shop.link.clock_off
        await shop.sell(record, 7)
        await shop.redeemer.redeem_all()
        assert (await shop.buyer.status(record.session)).redeemed == 7000
        assert shop.journal.unredeemed == 0
        await shop.sell(record, 3)
        await shop.journal.begin_close(shop.claim(record))
        for _ in range(2):
            assert await shop.redeemer.redeem_session(record.session, final=True)
        ended = await shop.buyer.status(record.session)
        assert (ended.status, ended.released, ended.refunded) == ("settled", 10_000, 990_000)
        assert (await shop.link.escrow.me()).balance == 9_900
        await shop.redeemer.contact()
        assert shop.journal.replaced == frozenset()


async def test_close_of_an_unused_session(
    escrow: RunningEscrow, keys: tuple[str, str], tmp_path: Path
) -> None:
    """A session closed without a call gives everything back."""
    async with shop_at(escrow, tmp_path / "journal.db", keys) as shop:
        record = await shop.open_session()
        await shop.journal.begin_close(shop.claim(record))
        assert await shop.redeemer.redeem_session(record.session, final=True)
        assert (await shop.buyer.status(record.session)).status == "refunded"
        assert (await shop.buyer.me()).balance == 10_000_000


async def test_buyer_releases_and_closes_by_hand(
    escrow: RunningEscrow, keys: tuple[str, str], tmp_path: Path
) -> None:
    """Releases by hand are not asked for again; a buyer's close leaves time for what is owed."""
    async with shop_at(escrow, tmp_path / "journal.db", keys) as shop:
        record = await shop.open_session()
        await shop.sell(record, 5)
        await shop.buyer.release(record.session, cumulative=Atomic(3000))
        await shop.buyer.close(record.session)
        await shop.redeemer.contact()
        assert shop.journal.unredeemed == 2000
        await shop.redeemer.redeem_all()
        assert shop.journal.unredeemed == 0
        closing = await shop.buyer.status(record.session)
        assert (closing.status, closing.released) == ("closing", 5000)
        assert closing.closing_deadline is not None
        await escrow.pass_time(closing.closing_deadline - escrow.clock() + 1)
        await shop.redeemer.contact()
        account = await shop.journal.account(record.session)
        assert account is not None
        assert account.state is SessionState.CLOSED


async def test_one_bad_item_among_good_ones(
    escrow: RunningEscrow, keys: tuple[str, str], tmp_path: Path
) -> None:
    """A session that another key signed for is written off; the rest of the batch is paid."""
    async with shop_at(escrow, tmp_path / "journal.db", keys) as shop:
        good, bad, unknown = [await shop.open_session() for _ in range(3)]
        await shop.sell(good)
        for record, changes in ((bad, {"key": bytes(32)}), (unknown, {"session": bytes(16)})):
            what = shop.claim(record)
            forged = claim_of(replace(_payment(what), **changes))
            call = await admitted(shop.journal, forged)
            await shop.journal.settle(call, used=0, outcome=None)
        await shop.redeemer.redeem_all()
        assert (await shop.buyer.status(good.session)).redeemed == 1000
        assert shop.journal.unredeemed == 0


def _payment(what: Claim) -> Payment:
    voucher = what.signed.voucher
    return Payment(
        terms=what.terms,
        token=what.token,
        network_id=voucher.network,
        session=voucher.session,
        seq=voucher.seq,
        cumulative=voucher.cumulative,
    )


@pytest.mark.parametrize("redeem", [False, True])
async def test_restored_backup(
    escrow: RunningEscrow, keys: tuple[str, str], tmp_path: Path, redeem: bool
) -> None:
    """A restored backup is found at first contact; old sessions get 409, new ones work at once."""
    path = tmp_path / "journal.db"
    async with shop_at(escrow, path, keys) as shop:
        old = await shop.open_session()
        await shop.sell(old)
    shutil.copy(path, tmp_path / "backup.db")
    async with shop_at(escrow, path, keys) as shop:
        await shop.redeemer.contact()
        await shop.sell(old, 5)
        await (shop.redeemer.redeem_all() if redeem else shop.redeemer.contact())
    shutil.copy(tmp_path / "backup.db", path)
    async with shop_at(escrow, path, keys) as shop:
        before, late = shop.journal.journal_id, shop.claim(old)
        await shop.redeemer.contact()
        assert shop.journal.replaced == {before}
        with pytest.raises(Refused) as refused:
            await admit(shop.journal, late)
        assert refused.value.reason == "journal_replaced"
        new = await shop.open_session()
        await shop.sell(new)
        await shop.redeemer.redeem_all()
        assert (await shop.buyer.status(new.session)).redeemed == 1000
        assert (await shop.buyer.status(old.session)).redeemed == (6000 if redeem else 1000)
        assert shop.journal.unredeemed == 0
        await shop.redeemer.contact()
        assert shop.journal.replaced == {before}


async def test_keys_rotate(escrow: RunningEscrow, keys: tuple[str, str], tmp_path: Path) -> None:
    """A token by a key that is newer than our key set opens after the key set was fetched."""
    async with shop_at(escrow, tmp_path / "journal.db", keys) as shop:
        await escrow.ledger.rotate_keys()
        record = await shop.open_session()
        await shop.link.refresh_keys()
        await shop.sell(record)
        await shop.redeemer.redeem_all()
        assert shop.journal.unredeemed == 0
