"""The escrow that the terms name: reachable for buyers, the right one, and on the same time."""

from ipaddress import ip_address

import httpx

from x402mw.core.errors import InsecureOrigin, Malformed, TokenRefused, X402mwError
from x402mw.core.messages import validate
from x402mw.core.strict import b64url_encode
from x402mw.core.terms import read_terms
from x402mw.core.tokens import open_key_set
from x402mw.core.vouchers import network_id
from x402mw.doctor.asking import Asker, Unreachable
from x402mw.doctor.findings import Finding, finding
from x402mw.doctor.terms import Offered
from x402mw_client.records import EscrowKeys, Health
from x402mw_client.secure import check_secure

APART_SECONDS = 30


async def check_escrow(
    asker: Asker, provider: httpx.URL, offered: Offered, root: str | None, ahead: float | None
) -> list[Finding]:
    """Asks the escrow for its health and keys; `ahead` is how far the provider's clock is ahead."""
    try:
        url = check_secure(httpx.URL(offered.extra.escrow))
    except (InsecureOrigin, httpx.InvalidURL, ValueError):
        return [finding("escrow_insecure", offered.extra.escrow)]
    if not url.host or set("?#@") & set(offered.extra.escrow):
        return [finding("escrow_insecure", offered.extra.escrow)]
    if _is_local(url) and not _is_local(provider):
        return [finding("escrow_local", offered.extra.escrow)]
    base = str(url).rstrip("/")
    try:
        answer = await asker.ask("GET", f"{base}/health")
        health = validate(Health, answer.content)
        keys = validate(
            EscrowKeys, (await asker.ask("GET", f"{base}/.well-known/x402mw-keys")).content
        )
    except (Unreachable, Malformed) as error:
        return [finding("escrow_unreachable", f"{base}: {error}")]
    found = _check_clock(health.time - answer.answered_at, health.time - answer.asked_at, ahead)
    return [*found, *_check_keys(offered, health, keys, root)]


def _is_local(url: httpx.URL) -> bool:
    """Whether a URL leads to the machine or link that it is asked from, in any spelling."""
    host = url.host.rstrip(".")
    try:
        address = ip_address(host)
    except ValueError:
        # Resolvers also take numbers such as "2130706433" and "127.1" for addresses.
        last = host.rpartition(".")[2]
        return last == "localhost" or last[:1].isdigit()
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _check_clock(least: float, most: float, ahead: float | None) -> list[Finding]:
    """Compares the provider's clock with the escrow's, both as seen from here."""
    if ahead is None:
        return []
    apart = max(least - ahead, 0.0) or min(most + 1 - ahead, 0.0)
    if abs(apart) <= APART_SECONDS:
        return []
    return [finding("clock_escrow", f"the escrow is {apart:+.0f} s from the provider")]


def _check_keys(
    offered: Offered, health: Health, keys: EscrowKeys, root: str | None
) -> list[Finding]:
    network = offered.requirements.network
    if {health.network, keys.network} != {network}:
        return [finding("escrow_network", f"offered {network}, found {health.network}")]
    if root is not None and root != b64url_encode(keys.root_key):
        return [finding("escrow_keys", f"the root key is {b64url_encode(keys.root_key)}")]
    try:
        if open_key_set(keys.key_set, keys.root_key).network != network:
            return [finding("escrow_network", "the key set is for another network")]
    except TokenRefused as error:
        return [finding("escrow_keys", str(error))]
    try:
        read_terms(offered.requirements, offered.extra, network_id(network, keys.root_key))
    except X402mwError as error:
        return [finding("terms_mismatch", str(error))]
    return []
