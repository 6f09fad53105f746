"""What must hold: the bounds we print (`docs/protocol.md`) and I1 to I19 (`docs/money.md`).

All of it is judged by files read past our code, and by what the oracle saw happen.
"""

from collections import defaultdict
from typing import Any

from tests.simulation import escrows, handlers, journals
from tests.simulation.escrows import FEE_BPS, Escrowed, Ledgered
from x402mw.core.amounts import to_atomic
from x402mw_client.sessions import State

SLACK = 1_000_000
"""What a busy provider may serve until it knows that the escrow is away (some 20 seconds here)."""
ENDED = ("released", "refunded", "settled")
CUT_OFF_SECONDS = 150.0
"""Who cannot reach a running escrow for longer than this may come too late with its vouchers."""


# At any time.


def check_books(world: Any, books: Ledgered) -> None:
    """What holds of the escrow's books after every operation: I1, I3 to I7 and I9."""
    oracle = world.oracle
    if sum(books.balances.values()):
        oracle.fail(f"I1 the balances sum to {sum(books.balances.values())}")
    for account, balance in books.balances.items():
        if balance < 0 and account != "world":
            oracle.fail(f"I3 {account} has {balance}")
    for one in books.escrows.values():
        _check_escrow(world, books, one)
        _check_signed(world, one)


def _check_escrow(world: Any, books: Ledgered, one: Escrowed) -> None:
    fail, name = world.oracle.fail, one.escrow_id
    held = one.amount - one.released - one.refunded
    if books.balances.get(f"escrow:{name}") != held:
        fail(f"I4 {name} holds something else than L - R - F = {held}")
    if not 0 <= one.redeemed <= one.released <= one.amount or one.refunded < 0:
        fail(f"I5 {one}")
    if one.refunded and one.status not in ENDED:
        fail(f"I5 {name} was refunded before its end")
    if one.fee != one.released * FEE_BPS // 10_000:
        fail(f"I7 {name} has fee {one.fee} of {one.released}")
    if one.status in ENDED and held:
        fail(f"I9 {name} has ended and holds {held}")
    for what in ("amount", "released", "redeemed", "refunded", "fee"):
        world.oracle.grows(what, name, getattr(one, what))


def _check_signed(world: Any, one: Escrowed) -> None:
    """Nobody is ever paid more than was signed for (or released by hand)."""
    most = max(world.oracle.signed[one.escrow_id].most, world.oracle.by_hand[one.escrow_id])
    if one.released > most:
        world.oracle.fail(f"{one.escrow_id} paid out {one.released}, but only {most} was signed")


# Once everything has settled.


def check_settled(world: Any) -> None:
    """What holds once everybody is well again and nothing is on its way."""
    for provider in world.providers:
        if provider.honest:
            _check_provider(world, provider)
    _check_runs(world)
    for buyer in world.buyers:
        _check_buyer(world, buyer)


def _check_runs(world: Any) -> None:
    restored = {provider.name: provider.restores for provider in world.providers}
    honest = {provider.name for provider in world.providers if provider.honest}
    thieves = tuple(thief.name + "-" for thief in world.thieves)
    by_seq: dict[Any, int] = defaultdict(int)
    for call, runs in world.oracle.by_call.items():
        for run in runs:
            by_seq[run.provider, run.session, run.seq] += 1
        # Who is lied to about an outcome may ask, and pay, again: within what it has signed.
        exempt = call.startswith(thieves or "?") or runs[0].provider not in honest
        if len(runs) > 1 + restored[runs[0].provider] and not exempt:
            world.oracle.fail(f"the handler of {call} ran {len(runs)} times")
    for (provider, session, seq), count in by_seq.items():
        if count > 1 + restored[provider]:
            world.oracle.fail(f"{provider} ran {count} handlers for one seq {seq} of {session}")


def _check_provider(world: Any, provider: Any) -> None:
    rows, calls = journals.read_journal(provider.path)
    fail = world.oracle.fail
    for row in rows.values():
        name = "esc_" + row.id.hex()
        if not row.charged + row.reserved <= row.best <= row.deposit:
            fail(f"{provider.name} {name}: the account is impossible: {row}")
        if row.reserved:
            fail(f"{provider.name} {name}: {row.reserved} is still reserved")
        if row.best > world.oracle.signed[name].most:
            fail(f"{provider.name} {name}: covered by more than was signed")
    provider.look()
    sums: dict[bytes, int] = defaultdict(int)
    for call in calls:
        sums[call.session] += call.charge
        if call.state != "settled":
            fail(f"{provider.name}: a call is still {call.state}")
    for session, charged in sums.items():
        if charged > rows[session].charged:
            fail(f"{provider.name}: the calls of {session.hex()} sum to more than was charged")
    if not (provider.restores or provider.excused or world.escrow.excused):
        _check_ratings(world, provider)
    _check_charges(world, provider, provider.calls)


def _check_charges(world: Any, provider: Any, rows: dict[tuple[str, int], Any]) -> None:
    """Each run of a handler is charged once, and for what it did."""
    seen = set()
    # By a clock that has jumped ahead calls are forgotten before we look for them.
    jumped = provider.excused or world.escrow.excused
    for run in world.oracle.runs:
        if run.provider != provider.name or provider.restores:
            continue
        seen.add((run.session, run.seq))
        row = rows.get((run.session, run.seq))
        if row is None:
            if run.ended and not (run.disturbed or jumped):
                world.oracle.fail(f"{run.call} ran, and the journal has no call of it")
            continue
        wanted = handlers.expected(run)
        if wanted is None:
            used = min(run.used, handlers.MOST[run.route])
            if row.used != used:
                world.oracle.fail(f"{run.call} used {used} and is billed for {row.used}")
        elif not wanted[0] <= row.charge <= wanted[1]:
            world.oracle.fail(f"{run.call} is charged {row.charge}, expected {wanted}: {run}")
    for key, row in rows.items():
        if key not in seen and row.charge and not provider.restores:
            world.oracle.fail(f"{provider.name} charged {row.charge} for {key}, which never ran")


def _check_ratings(world: Any, provider: Any) -> None:
    """I17: the quantities billed, rated again in one sum, give the charges to the unit."""
    charged: dict[Any, int] = defaultdict(int)
    used: dict[Any, int] = defaultdict(int)
    for call in provider.calls.values():
        if call.amount == handlers.TOKENS_AMOUNT and call.charge:
            key = (call.session, call.terms)
            charged[key] += call.charge - handlers.BASE
            used[key] += call.used
    for key, total in charged.items():
        rated = used[key] * handlers.UNIT_PRICE // handlers.PER
        if rated != total:
            world.oracle.fail(f"I17 {provider.name}: {used[key]} units were charged {total}")


def _check_buyer(world: Any, buyer: Any) -> None:
    oracle = world.oracle
    fail = oracle.fail
    by_id = {provider.account.agent_id: provider for provider in world.providers}
    for session in buyer.sessions:
        provider = by_id[session.offer.terms.pay_to]
        well = provider.honest and not provider.restores and not buyer.restores
        if not session.charged + session.held <= session.deposit:
            fail(f"{buyer.name} {session.name}: more is spent than locked")
        if well and session.state is State.DIFFERS:
            fail(f"{buyer.name} {session.name}: the accounts of two honest parties differ")
        if well and session.held and not buyer.excused:
            fail(f"{buyer.name} {session.name}: {session.held} is still held")


# At the very end.


async def check_end(world: Any) -> None:
    """Every lock has come home or was paid, and nobody lost more than we print."""
    fail = world.oracle.fail
    for problem in await world.escrow.check_books():
        fail(f"the ledger: {problem}")
    books = escrows.read_books(world.escrow.path)
    check_books(world, books)
    _check_postings(world, books)
    _check_locks(world, books)
    for one in books.escrows.values():
        if one.status not in ENDED:
            fail(f"{one.escrow_id} is stuck: {one}")
        world.oracle.count("released", one.released)
        world.oracle.count("refunded", one.refunded)
        world.oracle.count(f"ended: {one.close_reason}")
    for provider in world.providers:
        world.oracle.count("journals found restored", journals.count_replaced(provider.path))
        if provider.honest:
            _check_paid(world, provider, books)
    for buyer in world.buyers:
        _check_loss(world, buyer, books)


def _check_loss(world: Any, buyer: Any, books: Ledgered) -> None:
    """A buyer loses at most what it has signed and not yet used, and its limits hold."""
    told: dict[str, int] = defaultdict(int)
    for (session, _), charge in buyer.told.items():
        told[session] += charge
    for session in buyer.sessions:
        told[session.name] = max(told[session.name], session.charged)
    own = [one for one in books.escrows.values() if one.buyer == buyer.account.agent_id]
    whole = buyer.path is not None and not buyer.restores
    if whole and sum(one.released for one in own) > buyer.limits_total:
        world.oracle.fail(f"{buyer.name} paid more than its limit {buyer.total}")
    for one in own:
        loss = one.released - told[one.escrow_id]
        if whole and loss > buyer.open_most:
            world.oracle.fail(f"{buyer.name} lost {loss} in {one.escrow_id}")


def _check_locks(world: Any, books: Ledgered) -> None:
    """I11: what was asked for once was locked once, however often it was sent."""
    locks = world.oracle.locks
    for buyer in (*world.buyers, *world.thieves):
        own = [one for one in books.escrows.values() if one.buyer == buyer.account.agent_id]
        asked = locks[f"Bearer {buyer.account.api_key}"]
        if len(own) > len(asked):
            world.oracle.fail(f"I11 {buyer.name} asked for {len(asked)} sessions, has {len(own)}")
    for name, count in escrows.count_topups(world.escrow.path).items():
        if count > len(locks[name]):
            world.oracle.fail(f"I11 {name} was topped up {count} times for {len(locks[name])}")


def _check_postings(world: Any, books: Ledgered) -> None:
    """I8 and I18: what was posted, added up, is what the books say."""
    rebuilt: dict[str, int] = defaultdict(int)
    for source, target, amount in escrows.read_postings(world.escrow.path):
        rebuilt[source] -= amount
        rebuilt[target] += amount
    for account, balance in books.balances.items():
        if rebuilt[account] != balance:
            world.oracle.fail(f"I18 {account} has {balance}, posted {rebuilt[account]}")
    for provider in world.providers:
        earned = sum(
            one.released - one.fee
            for one in books.escrows.values()
            if one.provider == provider.account.agent_id
        )
        if books.balances[f"agent:{provider.account.agent_id}"] != earned:
            world.oracle.fail(f"I8 {provider.name} did not get what was released to it")


def _check_paid(world: Any, provider: Any, books: Ledgered) -> None:
    """A provider that was not cut off from a running escrow has all that it charged."""
    rows, _ = journals.read_journal(provider.path)
    excused = provider.cut_off > CUT_OFF_SECONDS or provider.excused or world.escrow.excused
    lost = 0
    for row in rows.values():
        one = books.escrows.get("esc_" + row.id.hex())
        paid = 0 if one is None else one.released
        if row.charged > paid:
            lost += row.charged - paid
            if not excused:
                world.oracle.fail(
                    f"{provider.name} charged {row.charged} in {row.id.hex()}, was paid {paid}"
                )
    if lost:
        world.oracle.count("providers with a loss")
    if lost > to_atomic(provider.unredeemed_max) + SLACK and not provider.restores:
        world.oracle.fail(f"{provider.name} lost {lost}, more than max_unredeemed")
