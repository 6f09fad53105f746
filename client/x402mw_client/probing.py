"""Learning a price: an unpaid request to an origin that is unknown, one at a time."""

import httpx

from x402mw_client.offers import choose, names_escrow, read_accepts
from x402mw_client.sessions import Offer
from x402mw_client.state import WalletState
from x402mw_client.steps import Outgoing, Send, Story, Wait
from x402mw_client.upkeep import trust

PROBE_SECONDS = 1.0


def probe(wallet: WalletState, request: Outgoing) -> Story[Offer | httpx.Response]:
    """Sends a request unpaid, unless another's probe teaches us its price first."""
    yield Wait(lambda: wallet.offers.find(request) or wallet.gate.enter(request), PROBE_SECONDS)
    known = wallet.offers.find(request)
    if known is not None:
        return known
    answered = False
    try:
        answer: httpx.Response = yield Send(None)
        answered = True
        # The gate opens only after the offer is learnt, so that the others can pay ahead.
        offer = yield from learn(wallet, request, answer)
    finally:
        wallet.gate.leave(request, answered=answered)
        wallet.signal.notify()
    return answer if offer is None else offer


def learn(wallet: WalletState, request: Outgoing, answer: httpx.Response) -> Story[Offer | None]:
    """Reads a 402 and remembers the offer that is ours to pay, if there is one."""
    ours = [entry for entry in read_accepts(answer) if names_escrow(entry, wallet.escrows)]
    if not ours:
        return None
    yield from trust(wallet)
    offer = choose(ours, request, wallet.network, wallet.network_id)
    if offer is not None:
        wallet.offers.learn(request.origin, offer)
    return offer
