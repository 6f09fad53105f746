"""The oracle: what must be true when everyone has come to an end, whatever went wrong before.

It stands outside our code. It reads the shop's own count of executions, the notes of the buyer's
caller and the three databases with plain SQL, and compares; of ours it uses only the receipt's
verification and, beside its own sums, the escrow's audit.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.faults import shop
from tests.faults.databases import ESCROW_SCHEMA, JOURNAL_SCHEMA, read
from tests.faults.process import World
from tests.faults.schedules import Schedule
from tests.faults.shopper import expected_charges, read_notes
from x402mw.core.errors import TokenRefused
from x402mw.core.keys import PUBLIC_KEY_BYTES
from x402mw.core.strict import b64url_decode
from x402mw.core.tokens import Receipt, open_receipt
from x402mw.escrow.books import audit
from x402mw.provider.journal.shared import SESSIONS_FORGOTTEN

FUNDS = 50_000_000
Row = dict[str, Any]
Seq = tuple[str, int]


@dataclass
class Evidence:
    """Everything that was left behind. Sessions are named `esc_...` everywhere."""

    schedule: Schedule
    executions: Counter[str]
    notes: list[Row]
    sessions: dict[str, Row] = field(default_factory=dict)
    calls: dict[Seq, Row] = field(default_factory=dict)
    meters: list[Row] = field(default_factory=list)
    totals: Row = field(default_factory=dict)
    escrows: dict[str, Row] = field(default_factory=dict)
    balances: dict[str, int] = field(default_factory=dict)
    parties: tuple[str, str] = ("", "")
    audit: list[str] = field(default_factory=list)
    wallet: dict[str, Row] = field(default_factory=dict)
    held: list[Row] = field(default_factory=list)
    openings: int = 0
    past: int = 0
    receipt_keys: list[str] = field(default_factory=list)
    forgotten_until: int = 0

    @property
    def pruned(self) -> bool:
        """Whether the journal has forgotten calls, because some clock went ahead."""
        return bool(self.totals["forgotten_until"])

    def named(self) -> dict[Seq, str]:
        """The name of each call that was ever signed."""
        return {
            (note["session"], note["seq"]): note["n"]
            for note in self.notes
            if "seq" in note and "session" in note
        }

    def ends(self) -> dict[str, Row]:
        """What the caller of each call was told."""
        return {note["n"]: note for note in self.notes if note["e"] == "end"}

    def step(self, name: str) -> Row:
        """The step of the script that a call's name stands for."""
        group, _, index = name.partition("~")[0].removeprefix("g").partition("-")
        return self.schedule.groups[int(group)][int(index)]


def judge(schedule: Schedule, world: World, parties: tuple[str, str]) -> tuple[list[str], Row]:
    """Returns everything that is wrong, and some figures; runs an event loop of its own."""
    found = asyncio.run(_gather(schedule, world, parties))
    return list(check(found)), {
        "calls": len(found.calls),
        "executions": sum(found.executions.values()),
        "charged": sum(row["charged"] for row in found.sessions.values()),
        "left held": len(found.held),
        "unknown": sum(end["outcome"] == "unknown" for end in found.ends().values()),
    }


# Gathering.


async def _gather(schedule: Schedule, world: World, parties: tuple[str, str]) -> Evidence:
    found = Evidence(
        schedule,
        Counter(shop.read_log(world.folder / "executions.log")),
        [note for path in sorted(world.folder.glob("notes*.log")) for note in read_notes(path)],
        parties=parties,
    )
    await _gather_journal(found, world.journal)
    await _gather_escrow(found, world.escrow_db)
    await _gather_wallet(found, str(world.folder / "wallet.db"))
    return found


async def _gather_journal(found: Evidence, place: str) -> None:
    names = ("sessions", "calls", "meters", "totals", "settings")
    queries = [f"SELECT * FROM {name}" for name in names]
    sessions, calls, found.meters, totals, settings = await read(place, JOURNAL_SCHEMA, *queries)
    known = {row["key"]: row["value"] for row in settings}
    found.forgotten_until = int(known.get(SESSIONS_FORGOTTEN, 0))
    found.sessions = {_name(row["id"]): row for row in sessions}
    found.calls = {(_name(row["session"]), row["seq"]): row for row in calls}
    (found.totals,) = totals


async def _gather_escrow(found: Evidence, place: str) -> None:
    names = ("escrows", "journals", "accounts")
    queries = [f"SELECT * FROM {name}" for name in names]
    escrows, journals, accounts = await read(place, ESCROW_SCHEMA, *queries)
    found.escrows = {row["escrow_id"]: row for row in escrows}
    found.receipt_keys = [row["receipt_key"] for row in journals]
    found.balances = {row["account"]: row["balance"] for row in accounts}
    found.audit = await audit(place)


async def _gather_wallet(found: Evidence, place: str) -> None:
    names = ("sessions", "calls", "openings", "settings")
    queries = [f"SELECT * FROM {name}" for name in names]
    sessions, found.held, openings, settings = await read(place, "", *queries)
    found.wallet = {_name(row["id"]): row for row in sessions}
    found.openings = len(openings)
    found.past = sum(int(row["value"]) for row in settings if row["name"] == "past_charged")


def _name(session: bytes) -> str:
    return f"esc_{session.hex()}"


# Checking.


def check(found: Evidence) -> Iterator[str]:
    """Every rule, on all that was gathered."""
    for rule in (
        _executions, _answers, _calls, _meters, _journal, _escrows, _wallet, _books, _receipts
    ):  # fmt: skip
        yield from (f"{rule.__name__.strip('_')}: {problem}" for problem in rule(found))


def _executions(found: Evidence) -> Iterator[str]:
    """Each logical request ran at most once, and only if it was sent."""
    for name, times in found.executions.items():
        if times > 1:
            yield f"{name} ran {times} times"
    for name, end in found.ends().items():
        if end["outcome"] == "not sent" and found.executions[name]:
            yield f"{name} was certainly not sent, and ran"


def _answers(found: Evidence) -> Iterator[str]:
    """What the caller was told of a call's cost is what the provider's journal says."""
    for name, end in found.ends().items():
        if end["outcome"] == "unknown" and not _clocks(found):
            yield f"{name} stayed unknown although everything works: {end['error']}"
        if end["outcome"] != "answer":
            continue
        row = found.calls.get((end["session"], end["seq"]))
        if row is None:
            if not found.pruned:
                yield f"{name} was answered, and the journal does not know it"
        elif end["charge"] not in (None, row["charge"]):
            yield f"{name} cost {end['charge']}, and {row['charge']} in the journal"
        yield from _answer(found, name, end)


def _answer(found: Evidence, name: str, end: Row) -> Iterator[str]:
    step, spoiled = found.step(name), _may_be_spoiled(found.schedule)
    if end["status"] == 200 and not found.executions[name] and not spoiled:
        yield f"{name} was answered, and never ran"
    if not _is_whole(name, step, end):
        if end["status"] == 200 and not spoiled and step["kind"] in ("item", "words"):
            yield f"{name} has an answer that is not its own: {end['body']!r}"
        return
    wanted = expected_charges(step["kind"], end["status"], step["size"])
    if wanted and end["charge"] not in (None, *wanted):
        yield f"{name} cost {end['charge']} instead of {wanted[0]}"


def _is_whole(name: str, step: Row, end: Row) -> bool:
    body = str(end["body"])
    kind = step["kind"]
    if end["status"] != 200:
        return kind in ("broken", "refuse")
    if kind in ("item", "words"):
        return f'"{name}"' in body
    if kind == "big":
        return bool(end["body"] == 8 * 4096)
    return bool(kind == "stream" and body.count("\n") == step["size"])


def _may_be_spoiled(schedule: Schedule) -> bool:
    """Whether something on the way may have changed an answer itself."""
    return any(
        fault.more and fault.more.get("link") == "buyer-provider"
        for fault in schedule.faults
        if fault.family == "proxy"
    )


def _clocks(found: Evidence) -> bool:
    """Whether some clock was wrong, so that vouchers may have run out unseen."""
    steps = [step["kind"] for group in found.schedule.groups for step in group]
    return "time" in steps or any(fault.family == "clock" for fault in found.schedule.faults)


def _calls(found: Evidence) -> Iterator[str]:
    """Every row of a call is settled, and a charge is for something that ran."""
    names = found.named()
    for key, row in found.calls.items():
        if row["state"] != "settled":
            yield f"a call is left {row['state']}"
        if key not in names:
            yield f"a call that the buyer never signed is in the journal (charge {row['charge']})"
        elif row["charge"] and not found.executions[names[key]]:
            yield f"{names[key]} cost {row['charge']} and never ran"
    for name, end in found.ends().items():
        charged = sum(row["charge"] for key, row in found.calls.items() if names.get(key) == name)
        if charged and (end["outcome"] == "not sent" or end.get("moved") == "NO"):
            yield f"{name} cost {charged}, and its caller was told that no money had moved"
    signed = Counter(names.values())
    rows = Counter(names[key] for key in found.calls if key in names)
    for name, count in rows.items():
        charged = [row for key, row in found.calls.items() if names.get(key) == name]
        if count > 1 and sum(row["charge"] > 0 for row in charged) > 1:
            yield f"{name} was charged {count} times ({signed[name]} forms)"


def _meters(found: Evidence) -> Iterator[str]:
    """The calls under a metered price cost what their whole quantity costs, to the unit."""
    if found.pruned:
        return
    for meter in found.meters:
        key = (meter["session"], meter["terms"])
        rows = [row for row in found.calls.values() if (row["session"], row["terms"]) == key]
        used, charged = sum(row["used"] for row in rows), sum(row["charge"] for row in rows)
        if used != meter["quantity"]:
            yield f"{used} units were billed, {meter['quantity']} counted"
        if charged != used * meter["unit_price"] // meter["per"]:
            yield f"{used} units cost {charged}"


def _journal(found: Evidence) -> Iterator[str]:
    """The journal's sums are those of its calls, nothing is reserved, nothing was given up."""
    for name, row in found.sessions.items():
        own = [call["charge"] for (session, _), call in found.calls.items() if session == name]
        if not found.pruned and sum(own) != row["charged"]:
            yield f"{name} was charged {row['charged']}, its calls sum to {sum(own)}"
        if row["reserved"]:
            yield f"{name} still reserves {row['reserved']}"
        if row["written_off"]:
            yield f"{name} was written off: {row['written_off']}"
    if found.totals["unredeemed"]:
        yield f"{found.totals['unredeemed']} is unredeemed"


def _escrows(found: Evidence) -> Iterator[str]:
    """Every session has ended and paid exactly what its provider charged."""
    for name, row in found.escrows.items():
        if row["status"] not in ("released", "refunded", "settled"):
            yield f"{name} is still {row['status']}"
        charged = found.sessions[name]["charged"] if name in found.sessions else 0
        # What the journal has forgotten the wallet still knows: `_wallet` compares the sums.
        forgotten = name not in found.sessions and row["claim_until"] <= found.forgotten_until
        if row["released"] != charged and not forgotten:
            yield f"{name} released {row['released']}, charged were {charged}"
        if row["amount"] != row["released"] + row["refunded"]:
            yield f"{name} locked {row['amount']}, paid out {row['released'] + row['refunded']}"
        if row["fee"] != row["released"] * row["fee_bps"] // 10_000:
            yield f"{name} has a fee of {row['fee']}"
    for name in found.sessions.keys() - found.escrows.keys():
        yield f"{name} is no session of the escrow"


def _wallet(found: Evidence) -> Iterator[str]:
    """The wallet knows every session, has closed it, and knows what they came to."""
    if found.openings:
        yield f"{found.openings} openings are unfinished"
    for name, row in found.wallet.items():
        if row["state"] != "closed":
            yield f"{name} is {row['state']} in the wallet"
    known = {note["session"] for note in found.notes if note["e"] == "opened"} | found.wallet.keys()
    for name in found.escrows.keys() - known:
        yield f"{name} is lost: its money was locked and the wallet does not know it"
    spent = found.past + sum(row["charged"] for row in found.wallet.values())
    released = sum(row["released"] for row in found.escrows.values())
    if spent != released and not found.held:
        yield f"the wallet has spent {spent}, and {released} was paid out"


def _books(found: Evidence) -> Iterator[str]:
    """No money came or went: the balances are what was there, paid and taken as a fee."""
    yield from found.audit
    buyer, seller = (found.balances[f"agent:{party}"] for party in found.parties)
    released = sum(row["released"] for row in found.escrows.values())
    fees = sum(row["fee"] for row in found.escrows.values())
    if sum(found.balances.values()):
        yield f"the balances sum to {sum(found.balances.values())}"
    if buyer != FUNDS - released:
        yield f"the buyer has {buyer} after paying {released}"
    if seller != released - fees:
        yield f"the seller has {seller} of {released - fees}"
    if found.balances["house:fees"] != fees:
        yield f"the house has {found.balances['house:fees']} of {fees}"


def _receipts(found: Evidence) -> Iterator[str]:
    """A final receipt is signed by the journal's key, and says what the journal says."""
    for note in found.notes:
        if note["e"] != "receipt":
            continue
        receipt = _open(found, note["receipt"])
        if receipt is None:
            if not _may_be_spoiled(found.schedule):
                yield "a receipt is signed by nobody who is known"
            continue
        name = _name(receipt.session)
        charged = found.sessions[name]["charged"] if name in found.sessions else 0
        if receipt.final and receipt.charged != charged:
            yield f"{name}'s final receipt says {receipt.charged}, the journal {charged}"
        elif receipt.charged > charged:
            yield f"{name}'s receipt says {receipt.charged}, the journal only {charged}"


def _open(found: Evidence, text: str) -> Receipt | None:
    for key in found.receipt_keys:
        with contextlib.suppress(TokenRefused):
            return open_receipt(text, b64url_decode(key, PUBLIC_KEY_BYTES))
    return None
