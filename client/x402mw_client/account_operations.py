"""What can be asked about accounts: agents, their keys and transfers, and for admins their tenants.

Values as in `operations`. What makes a secret is not repeated by itself: its answer is shown once,
so a lost one would leave a key that nobody has.
"""

from collections.abc import Sequence
from urllib.parse import quote

from x402mw.core import ids
from x402mw_client.operations import (
    API,
    AnyEscrow,
    Listing,
    Money,
    Operation,
    Progress,
    given,
    move,
    path_of,
    write_id,
    write_whole,
)
from x402mw_client.records import (
    Agent,
    ApiKey,
    ApiKeys,
    Booking,
    Claimed,
    EscrowRecord,
    Handle,
    NewAgent,
    NewApiKey,
    Page,
    Revoked,
    Transfer,
)

KEY, TRANSFER = "key_", "tr_"

# Our own account.


def register_agent(
    name: str,
    *,
    handle: str | None = None,
    mode: str | None = None,
    referral_code: str | None = None,
) -> Operation[NewAgent]:
    """Opens an account, live unless `mode` is "test". With an admin's key, in its tenant.

    Not repeated by itself: a lost answer would leave a second account.
    """
    body = given(name=name, handle=handle, mode=mode, referral_code=referral_code)
    return Operation(NewAgent, "POST", f"{API}/agents", body, repeatable=False)


def me() -> Operation[Agent]:
    """Shows the account behind our API key: its balance, and its keys without their secrets."""
    return Operation(Agent, "GET", f"{API}/agents/me")


def find_handle(handle: str) -> Operation[Handle]:
    """Finds the agent of our tenant that is called so."""
    return Operation(Handle, "GET", f"{API}/handles/{quote(handle, safe='')}")


def claim_faucet(*, key: str | None = None) -> Operation[Claimed]:
    """Asks the faucet for a first balance."""
    return move(Claimed, "/faucet/claim", key=key)


def revoke_myself(*, key: str | None = None) -> Operation[Revoked]:
    """Ends our own account: all its keys are dead at once. What it has and is owed stays its."""
    return move(Revoked, "/agents/me/revoke", {}, key)


# Our API keys.


def list_api_keys() -> Operation[ApiKeys]:
    """Shows our API keys that work, without their secrets."""
    return Operation(ApiKeys, "GET", f"{API}/agents/me/keys")


def create_api_key(name: str = "", scopes: Sequence[str] | None = None) -> Operation[NewApiKey]:
    """Makes another API key, which may no more than ours; without `scopes`, just as much."""
    body = given(name=name, scopes=None if scopes is None else list(scopes))
    return Operation(NewApiKey, "POST", f"{API}/agents/me/keys", body, repeatable=False)


def rotate_api_key(key_id: str, grace_seconds: int = 0) -> Operation[NewApiKey]:
    """Replaces an API key by a new one; the old one still works for `grace_seconds`."""
    path = f"{API}/agents/me/keys/{write_id(KEY, key_id)}/rotate"
    body = {"grace_seconds": grace_seconds}
    return Operation(NewApiKey, "POST", path, body, repeatable=False)


def revoke_api_key(key_id: str) -> Operation[ApiKey]:
    """Ends an API key at once; again is harmless."""
    return Operation(ApiKey, "DELETE", f"{API}/agents/me/keys/{write_id(KEY, key_id)}")


# Transfers.


def transfer(
    to: str, amount: Money, memo: str = "", *, key: str | None = None
) -> Operation[Transfer]:
    """Pays another agent at once, without an escrow and without a fee; nothing takes it back."""
    body = {"to_agent_id": to, "amount": write_whole(amount), "memo": memo}
    return move(Transfer, "/transfers", body, key)


def get_transfer(transfer_id: str) -> Operation[Transfer]:
    """Shows one transfer of ours."""
    return Operation(Transfer, "GET", f"{API}/transfers/{write_id(TRANSFER, transfer_id)}")


def list_transfers(
    *, role: str | None = None, limit: int | None = None, after: str | None = None
) -> Operation[Page[Transfer]]:
    """Fetches a page of our transfers, newest first; `role` is "sender" or "recipient"."""
    query = given(role=role, limit=limit, after=after)
    return Operation(Page[Transfer], "GET", f"{API}/transfers", query=query)


def iter_transfers(
    *, role: str | None = None, page_items: int | None = None, progress: Progress | None = None
) -> Listing[Transfer]:
    """Goes through all our transfers, newest first."""
    return Listing(lambda after: list_transfers(role=role, limit=page_items, after=after), progress)


# For the admins of a tenant.


def list_agents(*, limit: int | None = None, after: str | None = None) -> Operation[Page[Agent]]:
    """Fetches a page of our tenant's agents, by their ids."""
    query = given(limit=limit, after=after)
    return Operation(Page[Agent], "GET", f"{API}/admin/agents", query=query)


def iter_agents(
    *, page_items: int | None = None, progress: Progress | None = None
) -> Listing[Agent]:
    """Goes through all agents of our tenant."""
    return Listing(lambda after: list_agents(limit=page_items, after=after), progress)


def list_agent_escrows(
    agent_id: str, *, limit: int | None = None, after: str | None = None
) -> Operation[Page[EscrowRecord]]:
    """Fetches a page of the escrows of one agent of our tenant, newest first."""
    query = given(agent_id=agent_id, limit=limit, after=after)
    return Operation(Page[EscrowRecord], "GET", f"{API}/admin/escrow", query=query)


def iter_agent_escrows(
    agent_id: str, *, page_items: int | None = None, progress: Progress | None = None
) -> Listing[EscrowRecord]:
    """Goes through all escrows of one agent of our tenant, newest first."""
    return Listing(
        lambda after: list_agent_escrows(agent_id, limit=page_items, after=after), progress
    )


def agent_escrow_status(escrow: AnyEscrow) -> Operation[EscrowRecord]:
    """Shows an escrow that an agent of our tenant is a party of."""
    return Operation(EscrowRecord, "GET", f"{API}/admin{path_of(escrow)}")


def revoke_agent(agent_id: str, *, key: str | None = None) -> Operation[Revoked]:
    """Ends an agent of our tenant."""
    return move(Revoked, f"/admin/agents/{write_id(ids.AGENT, agent_id)}/revoke", {}, key)


# For the operator.


def book_deposit(
    agent_id: str, amount: Money, reference: str, *, key: str | None = None
) -> Operation[Booking]:
    """Books money that came in for an agent; a `reference` names one line of the bank, once."""
    return _book("deposits", agent_id, amount, reference, key)


def book_withdrawal(
    agent_id: str, amount: Money, reference: str, *, key: str | None = None
) -> Operation[Booking]:
    """Books money that was paid out to an agent."""
    return _book("withdrawals", agent_id, amount, reference, key)


def book_fees(amount: Money, reference: str, *, key: str | None = None) -> Operation[Booking]:
    """Books fees that the operator paid out to itself; the answer's `balance` is what is left."""
    body = {"amount": write_whole(amount), "reference": reference}
    return move(Booking, "/operator/fees", body, key)


def _book(
    what: str, agent_id: str, amount: Money, reference: str, key: str | None
) -> Operation[Booking]:
    body = {"agent_id": agent_id, "amount": write_whole(amount), "reference": reference}
    return move(Booking, f"/operator/{what}", body, key)
