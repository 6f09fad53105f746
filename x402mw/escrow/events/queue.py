"""What waits to be delivered: made from the log in order, the first of each escrow due.

Everything here is one small statement or two in the caller's transaction, so that a process which
dies between two of them has lost nothing and delivers again what it had not noted.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Row,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.escrow import schema
from x402mw.escrow.events.derive import Told
from x402mw.escrow.events.log import ENTRIES_AT_ONCE, read_events
from x402mw.escrow.events.posting import Outcome
from x402mw.escrow.events.turns import Due, Load, find_due
from x402mw.escrow.events.webhooks import ACTIVE, DEAD, DELIVERED, FAILING, WAITING
from x402mw.escrow.sets import Do, Set, Shape, write

LEASE_SECONDS = 15
RENEW_SECONDS = 5
UNWRITTEN_MAX = 5000
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 5, 60 * 60
GIVE_UP_SECONDS = 3 * 24 * 60 * 60
KEPT_SECONDS = 14 * 24 * 60 * 60
WAITING_MAX = 1000
"""How many deliveries may wait for one webhook; what comes then is dead at once."""

TOO_MANY = "too many waited"
_HOOKS, _SENT, _ONE = schema.webhooks, schema.deliveries, schema.deliverer
_COLUMNS = (
    *("webhook_id", "escrow_id", "event", "state", "seq", "part", "attempts", "changed_at"),
    *("next_at", "outcome", "body", "created_at"),
)
# Made once: to build a statement costs more than to run it.
_ANY, _CURSOR = select(_HOOKS.c.webhook_id).limit(1), select(_ONE.c.cursor)
# Written out, because an index of some rows is not used for a value that is only bound.
_IS_WAITING = _SENT.c.state == literal_column(f"'{WAITING}'")
_NEW = Shape(Do.INSERT, _SENT, _COLUMNS)
_THIS, _NOW = _HOOKS.c.webhook_id == bindparam("hook"), bindparam("now", type_=BigInteger)
_MORE = _HOOKS.c.waiting + bindparam("more", type_=BigInteger)
_PUT = update(_HOOKS).where(_THIS).values(waiting=_MORE)
_FIRST = (
    select(func.min(_SENT.c.next_at))
    .where(_SENT.c.webhook_id == bindparam("hook"), _SENT.c.next_at.is_not(None))
    .scalar_subquery()
)
# What is due already goes behind what others have due: each in its turn.
_TURN = update(_HOOKS).where(_THIS).values(next_at=case((_FIRST < _NOW, _NOW), else_=_FIRST))


class Look(NamedTuple):
    """What there is to do; up to `cursor` nobody wants any entry.

    `wanted`: deliveries are to be made. `more`: the log goes on. `far`: the cursor in the database
    is far behind. `due`: what is to be sent.
    """

    cursor: int
    wanted: bool = False
    more: bool = False
    far: bool = False
    due: Due = Due([], set())


class Done(NamedTuple):
    """One delivery that was tried, and how it ended."""

    row: Row[Any]
    outcome: Outcome


async def hold(connection: AsyncConnection, holder: str, now: int) -> bool:
    """Takes or keeps the lease: one process delivers."""
    mine = (_ONE.c.holder == holder) | (_ONE.c.held_until < now)
    # A lease far ahead was taken on a clock that was wrong.
    mine |= _ONE.c.held_until > now + 10 * LEASE_SECONDS
    taken = update(_ONE).where(mine).values(holder=holder, held_until=now + LEASE_SECONDS)
    return bool((await connection.execute(taken)).rowcount)


async def let_go(connection: AsyncConnection, holder: str) -> None:
    """Ends the lease, so that another need not wait for it."""
    mine = update(_ONE).where(_ONE.c.holder == holder)
    await connection.execute(mine.values(holder="", held_until=0))


async def look(connection: AsyncConnection, since: int, now: int, load: Load) -> Look:
    """Reads what there is to make and to send, as little as it can, and changes nothing."""
    cursor = (await connection.execute(_CURSOR)).scalar_one()
    if (await connection.execute(_ANY)).first() is None:
        return Look(cursor=since)
    since = max(since, cursor)
    wanted, upto = await _read_wanted(connection, since)
    return Look(
        cursor=since if wanted else upto,
        wanted=bool(wanted),
        more=not wanted and upto - since >= ENTRIES_AT_ONCE,
        far=upto - cursor >= UNWRITTEN_MAX,
        due=await find_due(connection, now, load),
    )


async def fill(connection: AsyncConnection, since: int, now: int) -> tuple[int, set[str]]:
    """Makes deliveries of the next entries, up to the last of them; returns it, and whose are due.

    Up to `since` the caller has seen that nobody wants any.
    """
    cursor = (await connection.execute(_CURSOR)).scalar_one()
    wanted, upto = await _read_wanted(connection, max(since, cursor))
    blocked = await _waiting(connection, wanted)
    rows, put, due, full = [], Counter[str](), set[str](), set[str]()
    for hook, told in wanted:
        name, at = hook.webhook_id, None
        fits = hook.waiting + put[name] < WAITING_MAX
        if fits:
            put[name] += 1
            if (name, told.escrow_id) not in blocked:
                blocked.add((name, told.escrow_id))
                due.add(name)
                at = now
        else:
            full.add(name)
        rows.append(
            (name, told.escrow_id, told.name, WAITING if fits else DEAD, told.seq, told.part, 0,
             now, at, None if fits else TOO_MANY, told.body, now)
        )  # fmt: skip
    await write(connection, Set(_NEW, rows))
    for name, count in put.items():
        await connection.execute(_PUT, {"hook": name, "more": count})
    await _make_due(connection, due, now)
    if full:
        failing = update(_HOOKS).where(_HOOKS.c.webhook_id.in_(full)).values(status=FAILING)
        await connection.execute(failing)
    await connection.execute(update(_ONE).values(cursor=upto))
    return upto, due


async def _make_due(connection: AsyncConnection, hooks: set[str], now: int) -> None:
    """Gives webhooks their turn, of which something is due from now on."""
    if hooks:
        later = or_(_HOOKS.c.next_at.is_(None), _HOOKS.c.next_at > now)
        sooner = update(_HOOKS).where(_HOOKS.c.webhook_id.in_(hooks), later)
        await connection.execute(sooner.values(next_at=now))


async def _read_wanted(
    connection: AsyncConnection, since: int
) -> tuple[list[tuple[Row[Any], Told]], int]:
    """The next events that webhooks want, and the last entry that was read for them.

    Only webhooks of their parties are read: how many others there are makes no difference.
    """
    events, upto = await read_events(connection, since)
    parties = {party for told in events for party in told.parties}
    if not parties:
        return [], upto
    by_agent = defaultdict[str, list[Row[Any]]](list)
    for row in await connection.execute(select(_HOOKS).where(_HOOKS.c.agent_id.in_(parties))):
        by_agent[row.agent_id].append(row)
    return [
        (hook, told)
        for told in events
        for party in told.parties
        for hook in by_agent.get(party, ())
        if _wants(hook, told)
    ], upto


def _wants(hook: Row[Any], told: Told) -> bool:
    return (
        hook.since < told.seq <= (hook.last_entry or told.seq)
        and hook.escrow_id in (None, told.escrow_id)
        and (not hook.events or told.name in hook.events.split())
    )


async def _waiting(
    connection: AsyncConnection, wanted: list[tuple[Row[Any], Told]]
) -> set[tuple[str, str]]:
    """Which of these webhooks wait to tell of which of these escrows."""
    if not wanted:
        return set()
    query = select(_SENT.c.webhook_id, _SENT.c.escrow_id).where(
        _IS_WAITING,
        _SENT.c.webhook_id.in_({hook.webhook_id for hook, _ in wanted}),
        _SENT.c.escrow_id.in_({told.escrow_id for _, told in wanted}),
    )
    return set(map(tuple, await connection.execute(query.distinct())))


async def settle(connection: AsyncConnection, tried: Sequence[Done], now: int) -> None:
    """Notes how deliveries ended, and makes the next of each escrow due."""
    left = Counter({row.webhook_id: 0 for row, _ in tried})
    for row, outcome in tried:
        attempts = row.attempts + 1
        dead = not outcome.delivered and now - row.created_at >= GIVE_UP_SECONDS
        state = DELIVERED if outcome.delivered else DEAD if dead else WAITING
        later = now + wait_seconds(attempts) if state == WAITING else None
        this = (_SENT.c.webhook_id == row.webhook_id) & (_SENT.c.seq == row.seq)
        noted = await connection.execute(
            update(_SENT)
            .where(this & (_SENT.c.part == row.part) & (_SENT.c.state == WAITING))
            .values(
                state=state,
                attempts=attempts,
                next_at=later,
                changed_at=now,
                outcome=outcome.text,
            )
        )
        if state != WAITING and noted.rowcount:
            left[row.webhook_id] += 1
            await _go_on(connection, row, now, FAILING if dead else ACTIVE)
    for name, count in left.items():
        # From here on nobody else makes one of its deliveries due, so the next looks at them all.
        await connection.execute(_PUT, {"hook": name, "more": -count})
        await connection.execute(_TURN, {"hook": name, "now": now})


def wait_seconds(attempts: int) -> int:
    """How long until the next attempt: longer each time, and not all at the same moment."""
    most = min(RETRY_MOST_SECONDS, RETRY_FIRST_SECONDS * 2 ** min(attempts - 1, 20))
    return random.randint(most // 2 + 1, most)  # noqa: S311 (nobody gains by guessing it)


async def _go_on(connection: AsyncConnection, row: Row[Any], now: int, status: str) -> None:
    same = (_SENT.c.webhook_id == row.webhook_id) & (_SENT.c.escrow_id == row.escrow_id)
    waiting = select(_SENT.c.seq, _SENT.c.part).where(same, _IS_WAITING)
    waiting = waiting.order_by(_SENT.c.seq, _SENT.c.part).limit(1)
    following = (await connection.execute(waiting)).first()
    if following is not None:
        this = (_SENT.c.seq == following.seq) & (_SENT.c.part == following.part)
        first = update(_SENT).where(same & this & _SENT.c.next_at.is_(None))
        await connection.execute(first.values(next_at=now))
    changed = (_HOOKS.c.webhook_id == row.webhook_id) & (_HOOKS.c.status != status)
    await connection.execute(update(_HOOKS).where(changed).values(status=status))


async def prune(connection: AsyncConnection, now: int) -> None:
    """Forgets what was delivered or given up long ago, and webhooks that have told their last."""
    old = ~_IS_WAITING & (_SENT.c.changed_at < now - KEPT_SECONDS)
    await connection.execute(delete(_SENT).where(old))
    cursor = select(_ONE.c.cursor).scalar_subquery()
    waits = exists().where(_SENT.c.webhook_id == _HOOKS.c.webhook_id, _IS_WAITING)
    await connection.execute(delete(_HOOKS).where(_HOOKS.c.last_entry <= cursor, ~waits))
