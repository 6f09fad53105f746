"""What entries say of rows beside the money, and where the rows say something else (I20).

Pure, like `books.Judge`: entries in, rows in, violations out. Books whose oldest entries say less
than today's are held to what was said: a row that no entry names is only wrong where its entry
would have named it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from x402mw.core.amounts import to_atomic
from x402mw.escrow import modes
from x402mw.escrow.rules.agreement import Dispute, Part
from x402mw.escrow.rules.table import Event
from x402mw.escrow.rules.values import Escrow
from x402mw.escrow.settings import DAY_SECONDS
from x402mw.escrow.terms import Extra, hash_terms
from x402mw.escrow.timing import Said

if TYPE_CHECKING:
    from x402mw.escrow.books import Entry
    from x402mw.escrow.people import People

_AGENT = "agent:"
_BANKED = ("deposit", "withdrawal", "fees")
_PENDING = {"state": "pending", "proof": "", "review_until": None}
_OF_DISPUTE = ("number", "opener", "part", "opened_at", "deadline")
_NOTHING = Said()
"""What entries say of an escrow that none is about."""

Key = tuple[Any, ...]
"""A table and the key of one of its rows."""

Row = Mapping[str, Any]


def hash_content(content: str) -> str:
    """What the entry of a statement holds of it."""
    return hashlib.sha256(content.encode()).hexdigest()


class Facts:
    """Sees every entry in order, then every row, then every escrow; says what is wrong."""

    def __init__(self, people: "People") -> None:
        """`people` are told what each entry says too, as it is read only once."""
        self._people = people
        self._rows: dict[Key, dict[str, Any]] = {}
        self._said: dict[str, Said] = {}
        self._unnamed_lines: Counter[Key] = Counter()
        self._open: dict[str, tuple[int, Dispute | None]] = {}
        self._agreements: dict[str, Row] = {}
        self._parts: dict[str, list[Part]] = {}

    def see(self, entry: "Entry") -> Iterator[str]:
        """The next entry."""
        try:
            data = json.loads(entry.data) if entry.data else {}
            self._people.see(entry, data)
            yield from self._see_time(entry, data)
            self._note(entry, data)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            yield f"I20 entry {entry.seq} does not say what its kind says"

    def _see_time(self, entry: "Entry", data: Mapping[str, Any]) -> Iterator[str]:
        """What an entry says of the times of an escrow, and whether time did not do it too soon."""
        name = entry.escrow_id
        if name is None:
            return
        yield from self._said.setdefault(name, Said()).see(entry, data)
        deadline = None
        if entry.kind == Event.REVIEW_END.value:
            part = self._rows.get(("parts", name, data["part"]), {})
            deadline = part.get("review_until")
        elif entry.kind == Event.UNDECIDED.value:
            opened = self._rows.get(("disputes", name, data["dispute"]["number"]), {})
            deadline = opened.get("deadline")
        if entry.effective_at < (deadline or 0):
            yield f"I20 entry {entry.seq} counts before what it waited for"

    def _note(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        if entry.escrow_id is not None:
            self._note_escrow(entry, entry.escrow_id, data)
        elif entry.kind == "transfer":
            self._note_transfer(entry, data)
        elif entry.kind == "faucet":
            self._note_claim(entry)
        elif entry.kind in _BANKED:
            self._note_line(entry, data)

    def _note_transfer(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        (move,) = entry.transfers
        said = {name: data[name] for name in ("transfer_id", "memo") if name in data}
        self._rows["transfers", entry.seq] = {
            "sender": move.source.removeprefix(_AGENT),
            "recipient": move.target.removeprefix(_AGENT),
            "asset": entry.asset,
            "amount": move.amount,
            "created_at": entry.created_at,
            **said,
        }

    def _note_claim(self, entry: "Entry") -> None:
        (move,) = entry.transfers
        self._rows["faucet_claims", move.target.removeprefix(_AGENT)] = {
            "amount": move.amount,
            "mode": modes.mode_of(entry.asset),
            "day": entry.created_at // DAY_SECONDS,
        }

    def _note_line(self, entry: "Entry", data: Mapping[str, Any]) -> None:
        (move,) = entry.transfers
        agent = move.source if entry.kind == "withdrawal" else move.target
        line = {
            "kind": entry.kind,
            "agent_id": None if entry.kind == "fees" else agent.removeprefix(_AGENT),
            "amount": move.amount,
            "created_at": entry.created_at,
        }
        if "reference" not in data:
            # Before lines were named, and where there is no line of a bank.
            self._unnamed_lines[tuple(line.values())] += 1
            return
        self._rows["bookings", data["reference"]] = {**line, "operator": entry.actor}

    def _note_escrow(self, entry: "Entry", name: str, data: Mapping[str, Any]) -> None:
        for number, state, review_until in data.get("parts", ()):
            part = {"state": state, "review_until": review_until}
            self._merge(("parts", name, number), part)
        if entry.kind == Event.DELIVER.value and "proof" in data:
            self._merge(("parts", name, data["part"]), {"proof": data["proof"]})
        if "dispute" in data:
            self._note_dispute(entry, name, data)
        if "evidence" in data:
            said = data["evidence"]
            self._rows["evidence", name, said["number"], said["line"]] = {
                "sha256": said["sha256"],
                "agent_id": entry.actor,
                "created_at": entry.created_at,
            }

    def _note_dispute(self, entry: "Entry", name: str, data: Mapping[str, Any]) -> None:
        said = dict(data["dispute"])
        for amount in said.keys() & {"amount", "to_provider", "to_buyer"}:
            said[amount] = to_atomic(said[amount])
        key = ("disputes", name, said.pop("number"))
        if entry.kind == Event.DISPUTE.value:
            said |= {"opener": entry.actor, "reason": data["reason"], "entry": entry.seq}
            said |= {"opened_at": entry.created_at, "status": "open", "arbiter": None}
            if "raises" in data:
                ended = {"status": "raised", "to_provider": 0, "to_buyer": 0, "arbiter": None}
                ended["decided_at"] = entry.created_at
                self._merge(("disputes", name, data["raises"]), ended)
        else:
            said["decided_at"] = entry.created_at
            said["arbiter"] = entry.actor if entry.kind == Event.RESOLVE.value else None
        self._merge(key, said)

    def _merge(self, key: Key, columns: Mapping[str, Any]) -> None:
        self._rows[key] = {**self._rows.get(key, {}), **columns}

    # Rows, once all entries were seen.

    def see_agreement(self, row: Row) -> Iterator[str]:
        """What a manual escrow has beside its row."""
        self._agreements[row["escrow_id"]] = row
        yield from ()

    def see_part(self, row: Row) -> Iterator[str]:
        """A part of a manual escrow: a milestone, or the whole."""
        name = row["escrow_id"]
        part = Part(*(row[field] for field in Part._fields))
        # The proof is compared below, and nothing else depends on it.
        self._parts.setdefault(name, []).append(part._replace(proof=""))
        said = self._rows.pop(("parts", name, row["number"]), {})
        expected = {**_PENDING, **said} if self._terms(name) else said
        yield from differ(f"part {row['number']} of {name}", row, expected)

    def see_dispute(self, row: Row) -> Iterator[str]:
        """A dispute."""
        name = row["escrow_id"]
        if row["status"] == "open":
            held, _ = self._open.get(name, (0, None))
            opened = Dispute(**{field: row[field] for field in _OF_DISPUTE})
            self._open[name] = (held + row["amount"], opened)
        key = ("disputes", name, row["number"])
        yield from self._compare(f"dispute {row['number']} of {name}", key, row)

    def see_evidence(self, row: Row) -> Iterator[str]:
        """A statement in a dispute."""
        name, number, line = row["escrow_id"], row["number"], row["line"]
        shown = {**row, "sha256": hash_content(row["content"])}
        what = f"statement {line} in dispute {number} of {name}"
        yield from self._compare(what, ("evidence", name, number, line), shown)

    def _compare(self, what: str, key: Key, row: Row) -> Iterator[str]:
        """Compares a row of an escrow; one that is older than its entries' words goes unnamed."""
        said = self._rows.pop(key, None)
        if said is None and self._terms(key[1]):
            yield f"I20 {what} is in no entry"
        yield from differ(what, row, said or {})

    def _terms(self, name: str) -> str | None:
        """The hash of an escrow's terms, which the entries of the oldest do not say."""
        return self._said.get(name, _NOTHING).terms

    def see_transfer(self, row: Row) -> Iterator[str]:
        """A transfer."""
        yield from self._compare_always(f"transfer {row['number']}", ("transfers",), row, "number")

    def see_claim(self, row: Row) -> Iterator[str]:
        """An agent's first money."""
        what = f"the first money of {row['agent_id']}"
        yield from self._compare_always(what, ("faucet_claims",), row, "agent_id")

    def see_booking(self, row: Row) -> Iterator[str]:
        """A line of the bank."""
        what = f"bank line {row['reference']}"
        if ("bookings", row["reference"]) not in self._rows:
            line = tuple(row[name] for name in ("kind", "agent_id", "amount", "created_at"))
            if self._unnamed_lines[line]:
                self._unnamed_lines[line] -= 1
                return
        yield from self._compare_always(what, ("bookings",), row, "reference")

    def _compare_always(self, what: str, table: Key, row: Row, key: str) -> Iterator[str]:
        """Compares a row that entries always named."""
        said = self._rows.pop((*table, row[key]), None)
        if said is None:
            yield f"I20 {what} is in no entry"
        yield from differ(what, row, said or {})

    def see_escrow(self, escrow: Escrow) -> Iterator[str]:
        """One escrow, when all other rows were seen."""
        name = escrow.escrow_id
        row, parts = self._agreements.pop(name, None), sorted(self._parts.pop(name, ()))
        extra = None
        if row is not None:
            milestones = [(part.number, part.name, part.amount) for part in parts]
            extra = Extra(row["condition"], row["review_seconds"], milestones)
        said = self._said.pop(name, _NOTHING)
        if said.terms not in (None, hash_terms(escrow, extra)):
            yield f"I20 {name} has other terms than it was made with"
        held, opened = self._open.pop(name, (0, None))
        if held != escrow.disputed:
            yield f"I20 {name} holds {escrow.disputed} for disputes over {held}"
        yield from said.check(escrow)
        if row is None:
            yield from said.check_session(escrow)
        else:
            yield from said.check_agreement(escrow, row, parts, opened)

    def end(self) -> Iterator[str]:
        """There are no more rows: what entries speak of and is gone."""
        for key in sorted(map(str, self._rows)):
            yield f"I20 the row {key} is gone"


def differ(what: str, row: Row, said: Mapping[str, Any]) -> Iterator[str]:
    """The columns of a row that are not what was said."""
    for name, value in said.items():
        if row[name] != value:
            yield f"I20 {what} has another {name} than its entry says"
