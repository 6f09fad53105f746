"""Redeeming with a restored backup: it is noticed, takes a new id, and redeems what it has."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.provider.journals import Clock, admit
from tests.provider.redeeming import A, B, Shop, open_shop, until
from tests.provider.scripted_escrow import Held, ScriptedEscrow
from x402mw.core.amounts import Atomic
from x402mw.core.errors import EscrowUnavailable
from x402mw.core.gate import Refused
from x402mw.core.ids import JOURNAL, format_id
from x402mw.provider.journal import JournalUnavailable, Report
from x402mw_client import operations

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The escrow's client gives up at once."""
    monkeypatch.setattr(operations, "PAUSES_SECONDS", (0.0,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the journal is."""
    return tmp_path / "journal.db"


@pytest.fixture
async def shop(path: Path) -> AsyncIterator[Shop]:
    """An open shop, with an escrow that does as it is told."""
    opened = await open_shop(path, ScriptedEscrow(), Clock())
    yield opened
    await opened.redeemer.stop()
    await opened.stop()


async def restored(path: Path, *, redeem: bool) -> Shop:
    """A shop whose journal was copied, used further, and then replaced by the copy."""
    escrow, clock = ScriptedEscrow(), Clock()
    shop = await open_shop(path, escrow, clock)
    await shop.sell(A)
    await shop.stop()
    shutil.copy(path, path.with_suffix(".backup"))
    shop = await open_shop(path, escrow, clock)
    await shop.sell(A, 5)
    await shop.redeemer.contact()
    # The serial shows at the second contact what the first one could not know.
    await shop.redeemer.contact()
    if redeem:
        await shop.redeemer.redeem_all()
    await shop.stop()
    shutil.copy(path.with_suffix(".backup"), path)
    return await open_shop(path, escrow, clock)


@pytest.mark.parametrize("redeem", [False, True])
async def test_restored_backup(path: Path, redeem: bool) -> None:
    """A restored backup takes a new id, admits nothing for old sessions, redeems what it has."""
    shop = await restored(path, redeem=redeem)
    before, heard = shop.journal.journal_id, asyncio.Event()
    old_claim = shop.claim(A)

    async def on_replaced() -> None:
        assert shop.journal.journal_id != before
        heard.set()

    await shop.redeemer.start(on_replaced=on_replaced)
    assert heard.is_set()
    assert shop.journal.replaced == {before}
    assert format_id(JOURNAL, shop.journal.journal_id) in shop.escrow.serials
    with pytest.raises(Refused) as refused:
        await admit(shop.journal, old_claim)
    assert (refused.value.status, refused.value.reason) == (409, "journal_replaced")
    await shop.sell(B)
    await shop.redeemer.stop()
    redeemed = {body["journal"]: body for body in shop.escrow.asked("redeem")[redeem:]}
    assert shop.escrow.sessions[B].redeemed == 1000
    assert shop.escrow.sessions[A].redeemed == (6000 if redeem else 1000)
    assert format_id(JOURNAL, shop.journal.journal_id) in redeemed
    assert shop.journal.unredeemed == 0
    identity = shop.journal.journal_id
    await shop.stop()
    again = await open_shop(path, shop.escrow, shop.clock)
    await again.redeemer.contact()
    assert (again.journal.journal_id, again.journal.replaced) == (identity, {before})
    await again.stop()


async def test_a_verdict_beyond_what_was_sent_shows_a_backup(shop: Shop) -> None:
    """If the escrow took more than this journal ever sent, the journal is a restored backup."""
    await shop.redeemer.contact()
    await shop.sell(A)
    shop.escrow.sessions[A] = Held(redeemed=5000, released=5000)
    before = shop.journal.journal_id
    await shop.redeemer.redeem_all()
    assert shop.journal.replaced == {before}


async def test_a_session_never_seen_here_shows_a_backup(shop: Shop) -> None:
    """A session of this journal that was redeemed, but has no row here, was forgotten."""
    shop.escrow.change(A, redeemed=1, released=1)
    before = shop.journal.journal_id
    await shop.redeemer.contact()
    assert shop.journal.replaced == {before}
    shop.escrow.change(B, released=5)
    await shop.redeemer.contact()
    assert shop.journal.replaced == {before}


async def test_registration_is_made_up_for(shop: Shop) -> None:
    """If the escrow goes away just as the journal takes a new id, it is registered later."""
    await shop.redeemer.contact()
    await shop.journal.apply_verdicts([Report(A, Atomic(1), Atomic(1), ended=False)])
    shop.escrow.sessions.clear()
    shop.escrow.down = True
    with pytest.raises(EscrowUnavailable):
        await shop.redeemer.contact()
    shop.escrow.down = False
    await shop.redeemer.contact()
    assert format_id(JOURNAL, shop.journal.journal_id) in shop.escrow.serials


async def test_the_new_id_is_told_until_it_is_heard(shop: Shop) -> None:
    """If offers cannot be made anew when the journal is replaced, that is tried again."""
    heard: list[bytes] = []

    async def on_replaced() -> None:
        heard.append(shop.journal.journal_id)
        if len(heard) == 1:
            raise JournalUnavailable("full")

    await shop.redeemer.start(on_replaced=on_replaced)
    shop.escrow.change(A, redeemed=1, released=1)
    await until(lambda: len(heard) == 2)
    await until(lambda: shop.redeemer._told == shop.journal.journal_id)
    assert heard == [shop.journal.journal_id] * 2
