"""The provider's link to its escrow: pinned once, remembered, and judged by its last contact."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from tests.provider.journals import Clock
from tests.provider.scripted_escrow import ScriptedEscrow
from tests.support.payments import (
    KEY_SET,
    NETWORK,
    NETWORK_ID,
    NOW,
    PAY_TO,
    ROOT_KEY,
    SIGNER,
    SIGNER_KEY,
    TOKEN,
    seed,
)
from x402mw.core.amounts import Atomic
from x402mw.core.errors import ConfigurationError, EscrowUnavailable, TokenRefused, UnknownKey
from x402mw.core.ids import JOURNAL, format_id
from x402mw.core.keys import public_key
from x402mw.core.signed import key_id
from x402mw.core.tokens import sign_session_token
from x402mw.provider import link as link_module
from x402mw.provider.journal import Journal
from x402mw.provider.link import EscrowLink
from x402mw_client import operations

pytestmark = pytest.mark.anyio

OTHER = seed("another signer")
OTHER_KEY = public_key(OTHER)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The escrow's client gives up at once."""
    monkeypatch.setattr(operations, "PAUSES_SECONDS", (0.0,))


@pytest.fixture
def clock() -> Clock:
    """A clock at the tests' present."""
    return Clock()


@pytest.fixture
def escrow() -> ScriptedEscrow:
    """An escrow that does as it is told."""
    return ScriptedEscrow()


@pytest.fixture
def journal(tmp_path: Path, clock: Clock) -> Iterator[Journal]:
    """An open journal."""
    opened = Journal.open(str(tmp_path / "journal.db"), clock=clock)
    yield opened
    opened.close()


@pytest.fixture
async def link(journal: Journal, escrow: ScriptedEscrow, clock: Clock) -> AsyncIterator[EscrowLink]:
    """A link that has met its escrow."""
    linked = make_link(journal, escrow, clock)
    await linked.start()
    yield linked
    await linked.stop()


def make_link(
    journal: Journal, escrow: ScriptedEscrow, clock: Clock, root_key: bytes | None = None
) -> EscrowLink:
    """A link that has not started."""
    return EscrowLink(journal, escrow.client(), root_key=root_key, clock=clock)


async def test_first_start(link: EscrowLink, escrow: ScriptedEscrow, journal: Journal) -> None:
    """The first start learns who the escrow and we are, and registers the journal's receipt key."""
    assert (link.network, link.network_id, link.pay_to) == (NETWORK, NETWORK_ID, PAY_TO)
    assert link.key_set == KEY_SET
    assert list(escrow.serials) == [format_id(JOURNAL, journal.journal_id)]
    assert not link.away


async def test_first_start_needs_the_escrow(
    journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """Without an escrow the very first start fails and says so; it can be tried again."""
    escrow.down = True
    with pytest.raises(ConfigurationError, match="first start"):
        await make_link(journal, escrow, clock).start()
    escrow.down = False
    await make_link(journal, escrow, clock).start()


async def test_a_half_finished_first_start(
    journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """A first start that broke off after pinning the root still registers the journal later."""
    await make_link(journal, escrow, clock).start()
    await journal.set_setting("registered", "")
    escrow.calls.clear()
    await make_link(journal, escrow, clock).start()
    assert [path for path, _ in escrow.calls] == [format_id(JOURNAL, journal.journal_id)]


async def test_later_starts_do_not_need_the_escrow(
    link: EscrowLink, journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """After its first start a provider starts with the escrow away, and opens tokens."""
    escrow.down = True
    again = make_link(journal, escrow, clock)
    await again.start()
    assert (again.pay_to, again.network_id, again.key_set) == (PAY_TO, NETWORK_ID, KEY_SET)
    assert again.away
    assert again.open_token(sign_session_token(TOKEN, SIGNER)).session == TOKEN.session


async def test_the_root_key_stays(
    link: EscrowLink, journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """A journal belongs to one root key: neither configuration nor the escrow can change it."""
    with pytest.raises(ConfigurationError):
        await make_link(journal, escrow, clock, OTHER_KEY).start()
    escrow.root, escrow.root_key = OTHER, OTHER_KEY
    with pytest.raises(TokenRefused):
        await link.refresh_keys()
    assert link.key_set == KEY_SET


async def test_a_configured_root_key_holds(
    journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """With a configured root key another escrow is refused at the first start."""
    with pytest.raises(ConfigurationError):
        await make_link(journal, escrow, clock, OTHER_KEY).start()
    await make_link(journal, escrow, clock, ROOT_KEY).start()


async def test_key_set_by_another_root(
    journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """A key set that the shown root key did not sign is refused at the first start."""
    escrow.root = OTHER
    with pytest.raises(ConfigurationError):
        await make_link(journal, escrow, clock).start()


async def test_the_serial_never_falls(link: EscrowLink, escrow: ScriptedEscrow) -> None:
    """A key set with a lower serial than ours is refused, one with a higher is kept."""
    escrow.key_set = replace(KEY_SET, serial=5, min_escrow=Atomic(7))
    await link.refresh_keys()
    assert link.key_set.min_escrow == 7
    escrow.key_set = replace(KEY_SET, serial=4)
    with pytest.raises(TokenRefused):
        await link.refresh_keys()
    escrow.key_set = replace(KEY_SET, serial=6, network="escrow:other")
    with pytest.raises(TokenRefused):
        await link.refresh_keys()
    assert link.key_set.serial == 5


async def test_a_fresh_key_set_survives_a_restart(
    link: EscrowLink, journal: Journal, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """The newest key set is remembered, not the first."""
    escrow.key_set = replace(KEY_SET, serial=5)
    await link.refresh_keys()
    escrow.down = True
    again = make_link(journal, escrow, clock)
    await again.start()
    assert again.key_set.serial == 5


async def refreshed(link: EscrowLink) -> None:
    """Waits for the fetch of the key set that runs behind."""
    assert link._refreshing is not None
    with anyio.fail_after(5):
        await link._refreshing


async def test_unknown_key_is_looked_for(link: EscrowLink, escrow: ScriptedEscrow) -> None:
    """A token by an unknown key is refused for now and has the key set fetched; then it opens."""
    text = sign_session_token(TOKEN, OTHER)
    escrow.key_set = replace(KEY_SET, serial=2, keys={**KEY_SET.keys, key_id(OTHER_KEY): OTHER_KEY})
    with pytest.raises(UnknownKey):
        link.open_token(text)
    await refreshed(link)
    assert link.open_token(text).session == TOKEN.session


async def test_at_most_one_refresh_in_thirty_seconds(
    link: EscrowLink, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """However many tokens by unknown keys arrive, the key set is fetched once per 30 s."""
    escrow.calls.clear()
    for second in range(61):
        clock.now = NOW + second
        for _ in range(5):
            with pytest.raises(UnknownKey):
                link.open_token(sign_session_token(TOKEN, OTHER))
        await refreshed(link)
    assert len(escrow.asked("x402mw-keys")) == 3


async def test_a_failed_refresh_is_harmless(
    link: EscrowLink, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """If the key set cannot be had, what we hold goes on working, and it is tried again."""
    escrow.down = True
    with pytest.raises(UnknownKey):
        link.open_token(sign_session_token(TOKEN, OTHER))
    await refreshed(link)
    assert link.open_token(sign_session_token(TOKEN, SIGNER)).session == TOKEN.session


async def test_an_expired_key_set_opens_nothing_new(
    link: EscrowLink, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """After `not_after` no new token is believed until a fresh key set has come."""
    clock.now = KEY_SET.not_after
    text = sign_session_token(TOKEN, SIGNER)
    with pytest.raises(UnknownKey):
        link.open_token(text)
    escrow.key_set = replace(KEY_SET, serial=2, not_after=KEY_SET.not_after + 86_400)
    await link.refresh_keys()
    link.open_token(text)


async def test_tokens_are_remembered(
    link: EscrowLink, escrow: ScriptedEscrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is verified once; a new key set has it verified again, and may retire its key."""
    monkeypatch.setattr(link_module, "TOKENS_CACHED_MAX", 2)
    text = sign_session_token(TOKEN, SIGNER)
    token = link.open_token(text)
    assert link.open_token(text) is token
    assert not token.retired
    for payer in ("ag_" + "01" * 16, "ag_" + "02" * 16):
        link.open_token(sign_session_token(replace(TOKEN, payer=payer), SIGNER))
    assert link.open_token(text) is not token
    escrow.key_set = replace(KEY_SET, serial=2, retired=frozenset({key_id(SIGNER_KEY)}))
    await link.refresh_keys()
    assert link.open_token(text).retired


async def test_a_forged_token_is_refused(link: EscrowLink) -> None:
    """A token that no key of the set signed is refused, every time it comes."""
    text = sign_session_token(TOKEN, SIGNER)
    forged = text[:-8] + ("AAAAAAAA" if text[-8:] != "AAAAAAAA" else "BBBBBBBB")
    for _ in range(2):
        with pytest.raises(TokenRefused):
            link.open_token(forged)


async def test_keys_are_fetched_again_in_time(
    link: EscrowLink, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """A key set is renewed about once an hour, not at every contact."""
    for seconds in (0, 10, 20, 3000, 3700, 3710):
        clock.now = NOW + seconds
        link.refresh_keys_in_time()
        await refreshed(link)
    assert len(escrow.asked("x402mw-keys")) == 3


async def test_away(link: EscrowLink, escrow: ScriptedEscrow, clock: Clock) -> None:
    """The escrow is away when the last contact failed, or is 30 s ago, or in the future."""
    assert not link.away
    clock.now = NOW + 29
    assert not link.away
    clock.now = NOW + 30
    assert link.away
    clock.now = NOW - 1
    assert link.away
    clock.now = NOW
    escrow.down = True
    with pytest.raises(EscrowUnavailable):
        await link.contact(link.escrow.health())
    assert link.away
    escrow.down = False
    await link.contact(link.escrow.me())
    assert not link.away


@pytest.mark.parametrize(
    ("date", "off"),
    [(NOW, False), (NOW + 30, False), (NOW - 30, False), (NOW + 31, True), (NOW - 31, True)],
)
async def test_clock_off(link: EscrowLink, escrow: ScriptedEscrow, date: int, off: bool) -> None:
    """Clocks more than 30 s apart are off; without a date what was known stays."""
    escrow.date = date
    await link.contact(link.escrow.me())
    assert link.clock_off == off
    escrow.date = None
    await link.contact(link.escrow.me())
    assert link.clock_off == off
    escrow.date = NOW
    await link.contact(link.escrow.me())
    assert not link.clock_off


async def test_a_slow_answer_is_no_wrong_clock(
    link: EscrowLink, escrow: ScriptedEscrow, clock: Clock
) -> None:
    """A date between asking and hearing is right, however long that took."""

    async def slow() -> None:
        await link.escrow.me()
        clock.now += 100

    await link.contact(slow())
    assert not link.clock_off
