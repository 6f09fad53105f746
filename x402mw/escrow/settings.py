"""What an operator can choose about an escrow service."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from x402mw.core.amounts import USDC, ZERO, Asset, Atomic, to_atomic
from x402mw.core.errors import ConfigurationError
from x402mw.core.tokens import CLAIM_SECONDS
from x402mw.escrow.modes import TEST

NETWORK = "escrow:main"
LOCAL_PROXIES = "127.0.0.1,::1,::ffff:127.0.0.1"
"""Whose word about a client's address counts: this machine's, in each spelling."""

ONE_DOLLAR, HUNDRED_DOLLARS = to_atomic("1.00"), to_atomic("100.00")
TEN_THOUSAND_DOLLARS = to_atomic("10000.00")
DAY_SECONDS = 24 * 60 * 60
"""A day of the faucet, in UTC."""

_NETWORK = re.compile(r"escrow:[-_a-zA-Z0-9]{1,32}", re.ASCII)


class Terms(NamedTuple):
    """What differs between live and test tenants, in atomic units."""

    min_escrow: Atomic
    faucet_amount: Atomic
    faucet_daily: Atomic


@dataclass(frozen=True, slots=True)
class Settings:
    """One escrow service. `root_seed` (32 bytes) is the key its whole word rests on.

    Amounts are atomic units of `asset`, times seconds. `claim_seconds` is S of the rules: how long
    after a token's end its vouchers stay redeemable. A checkpoint of the books is signed after so
    many entries or seconds. `local_webhooks` allows webhooks to this machine and its network, also
    without TLS.
    """

    database_url: str
    root_seed: bytes = field(repr=False)
    network: str = NETWORK
    asset: Asset = USDC
    min_escrow: Atomic = ONE_DOLLAR
    fee_bps: int = 100
    referral_bps: int = 1500
    claim_seconds: int = CLAIM_SECONDS
    faucet_amount: Atomic = ONE_DOLLAR
    faucet_daily: Atomic = HUNDRED_DOLLARS
    faucet_claims_per_source: int = 10
    test_min_escrow: Atomic = ZERO
    test_faucet_amount: Atomic = HUNDRED_DOLLARS
    test_faucet_daily: Atomic = TEN_THOUSAND_DOLLARS
    checkpoint_entries: int = 1000
    checkpoint_seconds: int = 600
    local_webhooks: bool = False

    def __post_init__(self) -> None:
        if not _NETWORK.fullmatch(self.network):
            raise ConfigurationError('a network is named like "escrow:main"')
        if not (0 <= self.fee_bps <= 10_000 and 0 <= self.referral_bps <= 10_000):
            raise ConfigurationError("fee and referral lie between 0 and 10000 basis points")
        if not 60 <= self.claim_seconds <= 600:
            raise ConfigurationError("claim_seconds lies between 60 and 600")

    def terms(self, mode: str) -> Terms:
        """What tenants of a mode are offered: test money is given away, so there is more of it."""
        terms = Terms(self.min_escrow, self.faucet_amount, self.faucet_daily)
        if mode == TEST:
            terms = Terms(self.test_min_escrow, self.test_faucet_amount, self.test_faucet_daily)
        # A day that is too small for one claim is no faucet, and nobody is told of one.
        enough = terms.faucet_amount <= terms.faucet_daily
        return terms if enough else terms._replace(faucet_amount=ZERO)
