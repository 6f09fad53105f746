"""The provider's link to its escrow: who it is there, whose keys it trusts, and whether it is away.

1. The root key is pinned at the first start (or by configuration) and never changes after.
2. Key sets are signed by the root; a set with a lower serial than one seen before is refused.
3. Everything needed to serve is kept in the journal: after its first start a provider starts, and
   serves for a while, with the escrow away.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from x402mw.core.errors import (
    ConfigurationError,
    EscrowRefused,
    EscrowUnavailable,
    TokenRefused,
    UnknownKey,
    X402mwError,
)
from x402mw.core.ids import JOURNAL, format_id
from x402mw.core.keys import PUBLIC_KEY_BYTES, check_public_key, public_key
from x402mw.core.strict import b64url_decode, b64url_encode
from x402mw.core.tokens import KeySet, SessionToken, open_key_set, open_session_token
from x402mw.core.vouchers import network_id
from x402mw.provider.journal import Journal
from x402mw_client.escrow import AsyncEscrowClient

AWAY_SECONDS = 30
CLOCK_SKEW_MAX_SECONDS = 30
REFRESH_SECONDS = 30
"""At most one fetch of the key set in this time, however many unknown keys turn up."""
KEYS_SECONDS = 3600
"""A key set is fetched again after this time, so that a key that was retired soon counts so."""
TOKENS_CACHED_MAX = 100_000
_COMMON = ("network", "pay_to", "journal", "receipt_key", "asset", "signed_by")

ROOT_KEY, KEY_SET, PAY_TO, REGISTERED = "root_key", "key_set", "pay_to", "registered"

log = logging.getLogger("x402mw.provider.link")

T = TypeVar("T")


class EscrowLink:
    """One provider's account at one escrow. Make it, `start` it, `stop` it."""

    key_set: KeySet
    pay_to: str
    network_id: bytes

    def __init__(
        self,
        journal: Journal,
        escrow: AsyncEscrowClient,
        *,
        root_key: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.escrow = escrow
        self._journal = journal
        self._root_key = root_key
        self._clock = clock
        self._reached_at = float("-inf")
        self._skewed = False
        self._tried_at = self._refreshed_at = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._tokens: dict[bytes, SessionToken] = {}
        self._older_tokens: dict[bytes, SessionToken] = {}
        self._newest: SessionToken | None = None

    async def start(self) -> None:
        """Recalls the escrow from the journal, or meets it: the very first start needs it there.

        Raises `ConfigurationError` if the escrow is away then, refuses our API key, or is not the
        one whose root key is pinned.
        """
        try:
            root_key = await self._recall_root() or await self._meet()
            self.key_set = open_key_set(self._setting(KEY_SET), root_key)
            self.network_id = network_id(self.key_set.network, root_key)
            self.pay_to = self._setting(PAY_TO)
            await self.ensure_registered()
        except EscrowUnavailable as error:
            raise ConfigurationError(
                f"the first start of a journal needs the escrow at {self.escrow.url}: {error}"
            ) from None
        except EscrowRefused as error:
            raise ConfigurationError(f"the escrow refuses this provider: {error}") from None
        except TokenRefused as error:
            raise ConfigurationError(
                f"the escrow's key set is not to be trusted: {error}"
            ) from None

    async def stop(self) -> None:
        """Ends what runs behind, and the connections."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await self.escrow.aclose()

    @property
    def network(self) -> str:
        """The escrow's network, as in `escrow:main`."""
        return self.key_set.network

    # Standing.

    @property
    def away(self) -> bool:
        """Whether the last contact failed, or is too long ago to count."""
        return not self._within(AWAY_SECONDS, self._reached_at)

    @property
    def clock_off(self) -> bool:
        """Whether the escrow's clock and ours were too far apart at the last contact."""
        return self._skewed

    async def contact(self, question: Awaitable[T]) -> T:
        """Awaits an answer of the escrow, and takes note whether and when there was one."""
        asked_at = self._clock()
        try:
            answer = await question
        except EscrowRefused:
            # A refusal is an answer too: whoever gives it is not away.
            self._reached_at = self._clock()
            raise
        except X402mwError:
            self._reached_at = float("-inf")
            raise
        self._reached_at = self._clock()
        self._compare_clocks(asked_at, self._reached_at)
        return answer

    def _compare_clocks(self, asked_at: float, answered_at: float) -> None:
        date = self.escrow.last_date
        if date is None:
            return
        slack = CLOCK_SKEW_MAX_SECONDS
        skewed = not asked_at - slack <= date <= answered_at + slack
        if skewed and not self._skewed:
            off = int(date - answered_at)
            more = {"event": "clock_off", "seconds": off}
            log.error("the escrow's clock differs from ours by %d s", off, extra=more)
        self._skewed = skewed

    # Tokens.

    def open_token(self, text: str) -> SessionToken:
        """Verifies a session token, from memory if it was seen before.

        Raises `TokenRefused`; for a key we do not hold `UnknownKey`, and then fetches newer keys.
        """
        name = hashlib.sha256(text.encode()).digest()
        token = self._tokens.get(name)
        if token is None:
            token = self._older_tokens.pop(name, None) or self._verify_token(text)
            self._remember_token(name, token)
        return token

    def _verify_token(self, text: str) -> SessionToken:
        try:
            self._check_keys_alive()
            token = open_session_token(text, self.key_set)
        except UnknownKey:
            self._refresh_behind()
            raise
        if self._newest is not None:
            token = _share(token, self._newest)
        self._newest = token
        return token

    def _remember_token(self, name: bytes, token: SessionToken) -> None:
        """Forgets by halves: what was not used since the last time goes, all at once."""
        self._tokens[name] = token
        if len(self._tokens) >= TOKENS_CACHED_MAX // 2:
            self._tokens, self._older_tokens = {}, self._tokens

    def _check_keys_alive(self) -> None:
        if self._clock() >= self.key_set.not_after:
            raise UnknownKey("the escrow's key set has expired and no newer one could be had")

    # Keys.

    async def refresh_keys(self) -> None:
        """Fetches the key set and keeps it if it is not older than ours."""
        self._tried_at = self._clock()
        answer = await self.escrow.keys()
        root_key = b64url_decode(self._setting(ROOT_KEY), PUBLIC_KEY_BYTES)
        fresh = open_key_set(answer.key_set, root_key)
        # Another worker may have kept a newer one than ours.
        kept = open_key_set(self._setting(KEY_SET), root_key)
        if fresh.network != self.network or fresh.serial < max(kept.serial, self.key_set.serial):
            raise TokenRefused("the escrow shows an older key set than before, or another network")
        self.key_set, self._refreshed_at = fresh, self._clock()
        # What is remembered of a token tells whether its key is retired.
        self._tokens, self._older_tokens = {}, {}
        await self._journal.set_setting(KEY_SET, answer.key_set)

    def refresh_keys_in_time(self) -> None:
        """Starts a fetch of the key set if ours is not new."""
        if not self._within(KEYS_SECONDS, self._refreshed_at):
            self._refresh_behind()

    def _refresh_behind(self) -> None:
        running = self._refreshing is not None and not self._refreshing.done()
        if not running and not self._within(REFRESH_SECONDS, self._tried_at):
            self._refreshing = asyncio.create_task(self._refresh_quietly())

    def _within(self, seconds: float, since: float) -> bool:
        """Whether so little time has passed; a clock that went back tells nothing."""
        return 0 <= self._clock() - since < seconds

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh_keys()
        except X402mwError as error:
            more = {"event": "keys_stale", "reason": error.code}
            log.warning("the escrow's key set could not be refreshed: %s", error, extra=more)

    # The first start.

    async def _recall_root(self) -> bytes | None:
        """Returns the pinned root key, None if there is none yet."""
        pinned = self._journal.setting(ROOT_KEY)
        if pinned is None:
            return None
        root_key = b64url_decode(pinned, PUBLIC_KEY_BYTES)
        if self._root_key not in (None, root_key):
            raise ConfigurationError("this journal belongs to an escrow with another root key")
        return root_key

    async def _meet(self) -> bytes:
        answer = await self.contact(self.escrow.keys())
        if self._root_key not in (None, answer.root_key):
            raise ConfigurationError("the escrow does not have the configured root key")
        root_key = check_public_key(answer.root_key)
        if open_key_set(answer.key_set, root_key).network != answer.network:
            raise TokenRefused("it is for another network than the escrow says")
        account = await self.escrow.me()
        await self._journal.set_setting(KEY_SET, answer.key_set)
        await self._journal.set_setting(PAY_TO, account.agent_id)
        # The root comes last: with it the meeting counts as done.
        await self._journal.set_setting(ROOT_KEY, b64url_encode(root_key))
        return root_key

    async def ensure_registered(self) -> None:
        """Registers the journal's present id at the escrow, unless that is done."""
        name = format_id(JOURNAL, self._journal.journal_id)
        if self._journal.setting(REGISTERED) != name:
            receipt_key = public_key(self._journal.receipt_seed)
            await self.escrow.register_journal(self._journal.journal_id, receipt_key)
            await self._journal.set_setting(REGISTERED, name)

    def _setting(self, key: str) -> str:
        value = self._journal.setting(key)
        if value is None:
            raise ConfigurationError(f"the journal has lost its setting {key}")
        return value


def _share(token: SessionToken, other: SessionToken) -> SessionToken:
    """A token that takes from another what both say: most of it, among tokens of one provider."""
    known = {name: getattr(other, name) for name in _COMMON}
    return replace(token, **{key: own for key, own in known.items() if own == getattr(token, key)})
