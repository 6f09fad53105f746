"""The escrow's API client: one table of operations behind two clients."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from x402mw.core.amounts import Atomic
from x402mw.core.errors import (
    ConfigurationError,
    EscrowRefused,
    EscrowUnavailable,
    InsecureOrigin,
    Moved,
)
from x402mw_client import Limits, Wallet, account_operations, operations
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient
from x402mw_client.operations import RedeemItem

pytestmark = pytest.mark.anyio

URL = "http://127.0.0.1:1"
SESSION, JOURNAL, KEY = b"s" * 16, b"j" * 16, bytes(32)
AGENT = {"agent_id": "ag_1", "name": "me", "balance": "1.50", "created_at": 1}
RECORD = {
    "escrow_id": "esc_" + SESSION.hex(),
    "kind": "session",
    "status": "locked",
    "from_agent_id": "ag_1",
    "to_agent_id": "ag_2",
    "asset": "USDC",
    "amount": "1.00",
    "released": "0.0000005",
    "redeemed": "0.00",
    "refunded": "0.00",
    "remaining": "1.00",
    "fee": "0.00",
    "session_key": "A" * 43,
    "journal": "jr_" + JOURNAL.hex(),
    "expires_at": 99,
    "token": "secret.token.x",
}
NO_PAUSE = pytest.mark.usefixtures("no_pause")


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats at once."""
    monkeypatch.setattr(operations, "PAUSES_SECONDS", (0.0, 0.0, 0.0))


def both(
    handler: Callable[[httpx.Request], httpx.Response], operation: operations.Operation[Any]
) -> Any:
    """Runs one operation through the sync client (the async one is driven by `each`)."""
    client = httpx.Client(transport=httpx.MockTransport(handler))
    return EscrowClient(URL, "pf_live_x", client=client).run(operation)


async def each(
    handler: Callable[[httpx.Request], httpx.Response], operation: operations.Operation[Any]
) -> Any:
    """Runs one operation through both clients and checks that they agree."""
    async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
        found = await AsyncEscrowClient(URL, "pf_live_x", client=client).run(operation)
    assert both(handler, operation) == found
    return found


async def test_amounts_and_ids_are_read() -> None:
    """Display strings become atomic units and ids raw bytes; a fraction of a unit is not money."""
    record = await each(
        lambda request: httpx.Response(200, json=RECORD), operations.status(SESSION)
    )
    assert (record.session, record.journal, record.deposit) == (SESSION, JOURNAL, 1_000_000)
    assert (record.released, record.token) == (0, "secret.token.x")
    assert "secret" not in repr(record)


async def test_the_request_carries_the_key_and_never_shows_it() -> None:
    """The API key travels in one header only, and the client's repr does not tell it."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=AGENT)

    assert (await each(handler, account_operations.me())).balance == 1_500_000
    assert all(request.headers["Authorization"] == "Bearer pf_live_x" for request in seen)
    assert "pf_live" not in str(seen[0].url) + repr(EscrowClient(URL, "pf_live_x"))


def moving() -> list[operations.Operation[Any]]:
    """Every operation that moves money."""
    return [
        account_operations.claim_faucet(),
        operations.open_session("ag_2", Atomic(1), session_key=KEY, journal=JOURNAL, memo="m"),
        operations.topup(SESSION, Atomic(1)),
        operations.release(SESSION, cumulative=Atomic(1)),
        operations.close(SESSION),
        operations.redeem(JOURNAL, 1, [RedeemItem(Atomic(1), voucher=bytes(176))]),
    ]


@pytest.mark.parametrize("operation", moving(), ids=lambda operation: operation.path)
@NO_PAUSE
def test_a_repeat_carries_the_same_idempotency_key(operation: operations.Operation[Any]) -> None:
    """A call that moves money is repeated after a lost answer, always under its first key."""
    keys: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 1:
            raise httpx.ReadError("lost")
        return httpx.Response(502 if len(keys) == 2 else 400, text="no")

    with pytest.raises(EscrowUnavailable):
        both(handler, operation)
    assert len(keys) == 3
    assert set(keys) == {operation.key}


@pytest.mark.parametrize("lost_first", [False, True])
@NO_PAUSE
async def test_a_key_that_died_after_a_lost_answer_decides_nothing(lost_first: bool) -> None:
    """A 401 after a lost answer may mean that the first try worked, and ended the key."""
    problem = {"type": "urn:x402mw:problem:unauthorized", "code": "unauthorized", "status": 401}
    told = {"title": "Unauthorized", "detail": "no"}

    async def plainly(*given: Any) -> Any:
        return both(*given)

    for run in (plainly, each):
        tries = 0

        def handler(_request: httpx.Request) -> httpx.Response:
            nonlocal tries
            tries += 1
            if tries == 1 and lost_first:
                raise httpx.ReadError("lost")
            media = {"content-type": "application/problem+json"}
            return httpx.Response(401, json=problem | told, headers=media)

        expected = EscrowUnavailable if lost_first else EscrowRefused
        with pytest.raises(expected) as caught:
            await run(handler, account_operations.revoke_myself())
        assert caught.value.moved is (Moved.MAYBE if lost_first else Moved.NO)
        assert tries == 1 + lost_first


def test_keys_are_random_unless_given() -> None:
    """Two calls are two payments, unless the caller says that they are one."""
    first, second = account_operations.claim_faucet(), account_operations.claim_faucet()
    assert first.key != second.key
    assert account_operations.claim_faucet(key="mine").key == "mine"


@NO_PAUSE
async def test_refusals_and_garbage_are_told_apart() -> None:
    """Only a problem of the escrow's own is a refusal; anything else decides nothing."""
    problem = {
        "type": "urn:x402mw:problem:insufficient_funds",
        "code": "insufficient_funds",
        "title": "Insufficient funds",
        "status": 402,
        "detail": "the balance is too small",
        "balance": "0.10",
    }
    with pytest.raises(EscrowRefused) as refused:
        await each(lambda request: httpx.Response(402, json=problem), account_operations.me())
    assert (refused.value.reason, refused.value.status) == ("insufficient_funds", 402)
    assert refused.value.problem["balance"] == "0.10"
    for garbage in (
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"agent_id": 7}),
        httpx.Response(404, json={"detail": "no such page"}),
        httpx.Response(409, json=problem, headers={"Retry-After": "1"}),
        httpx.Response(500, json=problem),
    ):
        with pytest.raises(EscrowUnavailable):
            await each(lambda request, answer=garbage: answer, account_operations.me())


@NO_PAUSE
async def test_an_account_is_not_opened_twice() -> None:
    """Registration is not repeated by itself: nobody could use the second account."""
    calls = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        raise httpx.ConnectError("away")

    with pytest.raises(EscrowUnavailable):
        both(handler, account_operations.register_agent("me"))
    assert len(calls) == 1


async def test_the_escrows_clock_is_kept() -> None:
    """`last_date` follows the `Date` header, and is nothing where that is nonsense."""

    def handler(request: httpx.Request) -> httpx.Response:
        date = {"/health": "Thu, 01 Jan 1970 00:01:00 GMT"}.get(request.url.path, "soon")
        body = {"status": "ok", "network": "escrow:test", "time": 60} | AGENT
        return httpx.Response(200, json=body, headers={"Date": date})

    escrow = EscrowClient(URL, client=httpx.Client(transport=httpx.MockTransport(handler)))
    assert escrow.health().network == "escrow:test"
    assert escrow.last_date == 60
    escrow.me()
    assert escrow.last_date is None


def test_what_goes_out() -> None:
    """Amounts go out as display strings, ids with their prefixes, vouchers in the wire form."""
    bodies: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json={"serial": 3, "items": [{"ok": False, "code": "x"}]})

    items = [
        RedeemItem(Atomic(1500), voucher=bytes(176)),
        RedeemItem(Atomic(0), session=SESSION, final=True),
    ]
    answer = both(handler, operations.redeem(JOURNAL, 7, items))
    assert answer.items[0].code == "x"
    first, second = bodies[0]["items"]
    assert first == {"amount": "0.0015", "voucher": "A" * 235}
    assert second == {"amount": "0.00", "escrow_id": "esc_" + SESSION.hex(), "final": True}
    assert (bodies[0]["journal"], bodies[0]["serial"]) == ("jr_" + JOURNAL.hex(), 7)


@pytest.mark.parametrize("url", ["http://escrow.example", "ftp://127.0.0.1", "http://127.evil.com"])
def test_plain_http_leaves_this_machine_never(url: str) -> None:
    """The API key goes out over https or to this very machine."""
    with pytest.raises(InsecureOrigin):
        AsyncEscrowClient(url)


@pytest.mark.parametrize("key", ["", "pf_ü", "pf_x\r\nX: y", "pf_x\n", "pf x", "pf_\x00"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    """Configuration: told when the client is made, not as an outage later, and not repeated."""
    limits = Limits(per_request="0.01", total="1.00")
    for make in (
        lambda: AsyncEscrowClient(URL, key),
        lambda: EscrowClient(URL, key),
        lambda: Wallet(escrow=URL, api_key=key, limits=limits),
    ):
        with pytest.raises(ConfigurationError) as told:
            make()
        assert "pf" not in str(told.value)
