"""The client and the API have the same operations: none is missing, none leads nowhere."""

import re
from typing import Any

from x402mw.core.amounts import Atomic
from x402mw.escrow.api import service
from x402mw.escrow.app import ROUTES
from x402mw_client import account_operations as accounts
from x402mw_client import event_operations as events
from x402mw_client import manual_operations as manual
from x402mw_client import operations
from x402mw_client.events_stream import EventStream
from x402mw_client.operations import Operation

E, J = b"e" * 16, b"j" * 16
AGENT, KEY, HOOK = ("ag_" + "a" * 32, "key_" + "a" * 32, "wh_" + "a" * 32)
ONE = Atomic(1)
NOT_FOR_CLIENTS = {("GET", "/openapi.json"), ("GET", "/docs")}

ALL: list[Operation[Any]] = [
    *(operations.health(), operations.keys(), operations.stats()),
    *(operations.register_journal(J, bytes(32)), operations.changes(0, J, 0)),
    *(operations.open_session("x", ONE, session_key=bytes(32), journal=J), operations.status(E)),
    *(operations.renew_token(E), operations.redeem(J, 1, []), operations.list_escrows()),
    *(operations.topup(E, ONE), operations.extend(E, 1), operations.release(E)),
    operations.close(E),
    *(manual.release_partial(E, ONE), manual.settle(E, ONE, ONE), manual.refund(E)),
    *(manual.return_money(E, ONE), manual.deliver(E), manual.approve(E), manual.reject(E)),
    *(manual.present_outcome(E, ""), manual.dispute(E, "x"), manual.add_evidence(E, "x")),
    *(manual.withdraw_dispute(E), manual.resolve_dispute(E, ONE, ONE), manual.list_disputes()),
    manual.list_cases(E),
    *(accounts.register_agent("x"), accounts.me(), accounts.find_handle("abc")),
    *(accounts.claim_faucet(), accounts.revoke_myself(), accounts.list_api_keys()),
    *(accounts.create_api_key(), accounts.rotate_api_key(KEY), accounts.revoke_api_key(KEY)),
    *(accounts.transfer("x", ONE), accounts.get_transfer("tr_" + "a" * 32)),
    *(accounts.list_transfers(), accounts.list_agents(), accounts.list_agent_escrows(AGENT)),
    *(accounts.agent_escrow_status(E), accounts.revoke_agent(AGENT)),
    *(accounts.book_deposit("x", ONE, "r"), accounts.book_withdrawal("x", ONE, "r")),
    accounts.book_fees(ONE, "r"),
    *(events.list_history(E), events.pause(E), events.resume(E), events.list_webhooks()),
    *(events.create_webhook("x"), events.delete_webhook(HOOK), events.rotate_webhook(HOOK)),
    *(events.list_deliveries(HOOK), events.redeliver(HOOK, "1"), EventStream(E, "1").operation),
]


def shape(method: str, path: str) -> tuple[str, str]:
    """A path with `*` for each of its ids."""
    plain = re.sub(r"\{\w+\}|[a-z]+_[0-9a-f]{32}", "*", path.removeprefix("/api/v1"))
    plain = plain.replace("/handles/abc", "/handles/*").replace("/deliveries/1/", "/deliveries/*/")
    return method, plain


def test_each_route_has_a_method_of_the_client() -> None:
    """What the API can, the client can, by the same method and path."""
    served = {(route.method, route.path) for route in (*ROUTES, *service.ROUTES)} - NOT_FOR_CLIENTS
    outside = {operation.path for operation in ALL if not operation.path.startswith("/api/v1/")}
    assert outside <= {route.path for route in service.ROUTES}
    asked = {shape(operation.method, operation.path) for operation in ALL}
    assert asked == {shape(method, path) for method, path in served}


def test_what_moves_money_has_a_key_and_is_repeated() -> None:
    """Money rule 8: each POST has its own idempotency key, but those that make a secret once."""
    for operation in ALL:
        if operation.method == "POST" and operation.repeatable:
            renewal = operation.path.endswith("/token")
            assert (operation.key is None) == renewal, operation.path
    once = {operation.path for operation in ALL if not operation.repeatable}
    assert once == {
        "/api/v1/agents",
        "/api/v1/agents/me/keys",
        f"/api/v1/agents/me/keys/{KEY}/rotate",
    }
