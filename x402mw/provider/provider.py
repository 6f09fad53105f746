"""A provider's identity and settings; `start` turns them into a running `Service`."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from x402mw.core.amounts import to_atomic
from x402mw.core.errors import AmountInvalid, ConfigurationError, Malformed
from x402mw.core.keys import PUBLIC_KEY_BYTES
from x402mw.core.pricing import Free
from x402mw.core.strict import b64url_decode
from x402mw.core.telemetry import Telemetry
from x402mw.provider.checks import check_times
from x402mw.provider.events import Events
from x402mw.provider.journal import Journal
from x402mw.provider.link import EscrowLink
from x402mw.provider.offers import Seller, make_book, serve_routes
from x402mw.provider.prices import PricedRoute
from x402mw.provider.redeemer import Redeemer
from x402mw.provider.request import Origins
from x402mw.provider.service import FREE_CALLS_PER_MINUTE, Quota, Service
from x402mw.provider.settings import JOURNAL_DEFAULT, read_settings
from x402mw_client.escrow import AsyncEscrowClient

log = logging.getLogger("x402mw.provider")

UNREDEEMED_MAX = "10.00"
REDEEM_SECONDS = 30

Prices = Mapping[tuple[str, str], PricedRoute | Free]


class Provider:
    """Who sells: an account at an escrow, and a journal that is its book.

    `escrow` is the escrow's URL, `api_key` the account's bearer secret. `journal` is a file path or
    a `postgresql://` URL; all workers behind one address share one. `origins` are the addresses
    buyers use ("https://api.example.com"); a loopback address needs none. `escrow_root` pins the
    escrow's root key (base64url); without it the first one seen is pinned. `durability` "fsync"
    survives power loss, "process" only the loss of the process. At most `unredeemed_max` (display
    units) is served on credit while the escrow is away. `telemetry` takes figures
    (`docs/operations.md`).
    """

    def __init__(
        self,
        *,
        escrow: str,
        api_key: str,
        journal: str = JOURNAL_DEFAULT,
        origins: Iterable[str] = (),
        escrow_root: str | None = None,
        durability: Literal["fsync", "process"] = "fsync",
        unredeemed_max: str = UNREDEEMED_MAX,
        redeem_seconds: int = REDEEM_SECONDS,
        free_calls_per_minute: int = FREE_CALLS_PER_MINUTE,
        clock: Callable[[], float] = time.time,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._escrow = escrow.rstrip("/")
        self._api_key = api_key
        self._journal = journal
        self._origins = Origins(origins)
        self._root = None if escrow_root is None else _read_root(escrow_root)
        self._durability: Literal["fsync", "process"] = durability
        try:
            self._unredeemed_max = to_atomic(unredeemed_max)
        except AmountInvalid as error:
            raise ConfigurationError(f"unredeemed_max: {error}") from None
        self._redeem_seconds = redeem_seconds
        self._free_calls_per_minute = free_calls_per_minute
        self._clock = clock
        self._telemetry = telemetry

    @classmethod
    def from_env(cls, **more: Any) -> "Provider":
        """Reads the `X402MW_*` settings that `x402mw register` prints; `more` is passed on.

        Raises `ConfigurationError` naming what is missing.
        """
        return cls(**read_settings(), **more)

    async def start(self, prices: Prices, *, path_prefix: str, control_path: str) -> Service:
        """Opens the journal, meets the escrow, and returns what requests need.

        The very first start needs the escrow; later ones do not. Raises `ConfigurationError` for
        what could not work: a damaged journal, an unknown account, times that do not fit.
        """
        journal = await asyncio.to_thread(
            Journal.open, self._journal, durability=self._durability, clock=self._clock
        )
        link = EscrowLink(
            journal,
            AsyncEscrowClient(self._escrow, self._api_key),
            root_key=self._root,
            clock=self._clock,
        )
        try:
            await link.start()
            check_times(
                prices,
                claim_seconds=link.key_set.claim_seconds,
                redeem_seconds=self._redeem_seconds,
            )
            service = await self._serve(journal, link, prices, path_prefix, control_path)
        except BaseException:
            await link.stop()
            journal.close()
            raise
        return service

    async def _serve(
        self, journal: Journal, link: EscrowLink, prices: Prices, path_prefix: str, control: str
    ) -> Service:
        events = Events(self._telemetry)
        redeemer = Redeemer(
            journal, link, by_age=self._redeem_seconds, events=events, clock=self._clock
        )

        async def rebuild() -> None:
            """Offers name the journal: when that is replaced, they are made anew."""
            seller = Seller(
                network=link.network,
                network_id=link.network_id,
                pay_to=link.pay_to,
                journal=journal.journal_id,
                escrow=self._escrow,
                path_prefix=path_prefix,
                control=path_prefix + control,
                deposit_min=link.key_set.min_escrow,
            )
            service.served = serve_routes(seller, prices)
            ids = [one.offer.terms.id for one in service.served.values()]
            retired = await journal.keep_terms(ids)
            service.book = make_book(
                seller, service.served, retired=retired, replaced=journal.replaced
            )

        service = Service(
            journal=journal,
            link=link,
            redeemer=redeemer,
            origins=self._origins,
            unredeemed_max=self._unredeemed_max,
            quota=Quota(self._free_calls_per_minute),
            clock=self._clock,
            events=events,
        )
        await rebuild()
        await redeemer.start(on_replaced=rebuild)
        return service


def _read_root(text: str) -> bytes:
    try:
        return b64url_decode(text, PUBLIC_KEY_BYTES)
    except Malformed as error:
        raise ConfigurationError(f"escrow_root: {error}") from None
