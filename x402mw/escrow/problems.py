"""Every way the escrow refuses, in one place: codes, what they mean, and what to do now.

A code is for ever; its texts may get better. `docs/escrow.md` shows the same table.
"""

from typing import NamedTuple


class Problem(NamedTuple):
    """What one code stands for; several statuses if it is told in several places."""

    statuses: tuple[int, ...]
    meaning: str
    advice: str


PROBLEMS = {
    # What cannot be read.
    "malformed": Problem(
        (400, 422),
        "not strict JSON, or a header or voucher that cannot be read",
        "correct the request; it would be refused again as it is",
    ),
    "body_too_large": Problem(
        (413,), "more bytes or values than a body may have", "send less, or in several requests"
    ),
    "body_timeout": Problem(
        (408,), "the body came too slowly", "send it again, with the same idempotency key"
    ),
    "unsupported_media_type": Problem(
        (415,),
        "the body is said to be something else than plain JSON",
        "send Content-Type: application/json, without a Content-Encoding",
    ),
    "invalid_request": Problem(
        (422,),
        "a field or parameter is missing, unknown or out of range",
        "correct what `errors` or `detail` names; it would be refused again as it is",
    ),
    # Who asks.
    "unauthorized": Problem(
        (401,),
        "no API key, or one that is unknown, expired or revoked",
        "send Authorization: Bearer with a key that works",
    ),
    "scope": Problem(
        (403,),
        "this key may not do that",
        "use a key of the same agent with one of `scopes`, or with all if `detail` says so",
    ),
    "not_the_buyer": Problem((403,), "only the buyer of this escrow may do that", "ask the buyer"),
    "not_the_provider": Problem(
        (403,), "only the provider of this escrow may do that", "ask the provider"
    ),
    "not_the_opener": Problem(
        (403,),
        "only who opened the dispute may withdraw it, and nobody what both want",
        "ask the other party, or wait for the decision",
    ),
    "not_the_operator": Problem(
        (403,), "only the operator of this escrow may do that", "ask the operator"
    ),
    "arbiter_is_party": Problem(
        (403,), "an arbiter decides between others", "let another arbiter decide"
    ),
    # What is not there.
    "not_found": Problem(
        (404,),
        "no such thing, or not yours: the two look the same",
        "check the id, the path without a slash at its end, and whose key you use",
    ),
    "method_not_allowed": Problem(
        (405,), "this path has no such method", "use one of those that `Allow` names"
    ),
    "unknown_agent": Problem(
        (404,),
        "no such agent in the mode of your key",
        "check the id; live and test agents do not see each other",
    ),
    "unknown_journal": Problem(
        (404,),
        "the payee has not registered this journal",
        "take payee and journal from the provider's own terms",
    ),
    "unknown_tenant": Problem((404,), "no such tenant", "ask the operator"),
    "unknown_referral_code": Problem(
        (404,), "no agent of your mode has this code", "check the code, or leave it out"
    ),
    # What the state of things does not allow.
    "invalid_state": Problem(
        (409, 422),
        "not possible in the escrow's `state`",
        "read the escrow again, and the table of states; once it is possible, ask with a fresh"
        " idempotency key",
    ),
    "wrong_kind": Problem(
        (409,),
        "sessions are paid by vouchers, manual escrows by hand",
        "read `kind`, and use what that kind has",
    ),
    "expired": Problem(
        (409,), "its time is over", "open a new escrow; what is left ends as `on_expiry` says"
    ),
    "review_over": Problem(
        (409,),
        "the time to answer this delivery is over",
        "it is accepted, and paid when the dispute ends; say in the dispute what is wrong",
    ),
    "not_covered": Problem(
        (409,),
        "more than may be moved in this way",
        "take at most `available`, with a fresh idempotency key",
    ),
    "insufficient_funds": Problem(
        (409,),
        "your `balance` does not suffice",
        "deposit, then send it again with a fresh idempotency key",
    ),
    "amount_out_of_range": Problem(
        (409,), "no total may pass 2^63 - 1 units", "use a smaller amount"
    ),
    "session_ending": Problem(
        (409,),
        "too near its end for another token",
        "extend it, or open a new session; with a fresh idempotency key",
    ),
    "recipient_mismatch": Problem(
        (409,), "an escrow pays its provider and nobody else", "leave out to_agent_id"
    ),
    "no_condition": Problem(
        (409,), "this escrow was made without a condition", "release it by hand"
    ),
    "condition_not_met": Problem(
        (409,),
        "not the outcome, or not the signature, that was agreed on",
        "present exactly the agreed outcome, as text",
    ),
    "too_much_evidence": Problem(
        (409,),
        "you have made as many statements in this dispute as a party may",
        "wait for the decision",
    ),
    "withdrawn_too_often": Problem(
        (409,),
        "you have taken back too many disputes over the same",
        "go by the terms, or agree with the other party",
    ),
    "agent_revoked": Problem((409,), "this agent trades no more", "use another agent"),
    "mode_mismatch": Problem(
        (409,), "your key's tenant has the other mode", "use a key of the mode you want"
    ),
    "handle_taken": Problem((409,), "another agent is called so", "choose another handle"),
    "tenant_taken": Problem((409,), "there is such a tenant already", "choose another name"),
    "journal_taken": Problem(
        (409,),
        "this journal has another owner or receipt key",
        "start the provider with a journal of its own",
    ),
    "reference_taken": Problem(
        (409,), "a line with this reference was booked", "nothing, if it is the same line"
    ),
    "faucet_claimed": Problem((409,), "this agent has had its first money", "nothing"),
    "no_faucet": Problem((409,), "this escrow gives no first money", "ask for a deposit"),
    "too_many_keys": Problem((409,), "an agent has few keys", "revoke one that you do not use"),
    "too_many_webhooks": Problem(
        (409,),
        "an agent has few webhooks",
        "delete one that you do not use, then ask with a fresh idempotency key",
    ),
    "waits_its_turn": Problem(
        (409,),
        "an earlier event of the same escrow comes first",
        "redeliver that one, or wait until it is delivered or given up; with a fresh idempotency"
        " key",
    ),
    "key_ending": Problem(
        (409,), "this key was rotated or revoked", "use the key that replaces it"
    ),
    "last_key": Problem((409,), "no other key could make one", "rotate it instead"),
    "idempotency_running": Problem(
        (409,),
        "the first request with this key is still running",
        "send the same again after `Retry-After`",
    ),
    # What makes no sense.
    "idempotency_mismatch": Problem(
        (422,), "this key was used for another request", "use a fresh idempotency key"
    ),
    "below_minimum": Problem(
        (422,), "an escrow locks at least `minimum`", "lock more, with a fresh idempotency key"
    ),
    "self_payment": Problem((422,), "you would pay yourself", "name another agent"),
    "self_referral": Problem(
        (422,), "a party to the escrow cannot be its referrer", "leave the code out"
    ),
    "unknown_milestone": Problem(
        (422,), "the escrow has no milestone of this name", "use one of `names`"
    ),
    # Vouchers of a provider's close; in a batch they are verdicts.
    "wrong_network": Problem(
        (422,), "the voucher is for another network", "redeem it at the escrow of its network"
    ),
    "unknown_session": Problem(
        (422,),
        "you are not the provider of such a session",
        "check voucher, escrow and whose key you use",
    ),
    "signature": Problem(
        (422,), "the session key did not sign this voucher", "drop it; it will never count"
    ),
    "voucher_required": Problem(
        (422,), "only a final amount of 0 needs no voucher", "send the voucher with the amount"
    ),
    # Too much, and failures.
    "faucet_limit": Problem(
        (429,),
        "too many claims from this address, or for today",
        "try again after `retry_after_seconds`, with a fresh idempotency key",
    ),
    "too_many_streams": Problem(
        (429,), "too many streams of events are open", "close one, or follow all escrows in one"
    ),
    "internal": Problem(
        (500,), "the escrow failed", "send the same again, with the same idempotency key"
    ),
    "unavailable": Problem(
        (503,),
        "the escrow cannot reach its books right now",
        "send the same again after `Retry-After`, with the same idempotency key",
    ),
}


def table() -> str:
    """The catalogue as the table in the documentation."""
    lines = ["| Status | Code | Meaning | What to do now |", "|---|---|---|---|"]
    for code, problem in sorted(PROBLEMS.items(), key=lambda item: (item[1].statuses, item[0])):
        statuses = ", ".join(map(str, problem.statuses))
        lines.append(f"| {statuses} | `{code}` | {problem.meaning} | {problem.advice} |")
    return "\n".join(lines) + "\n"
