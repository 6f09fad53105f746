"""The story of one schedule: start, break, heal, settle, and ask the oracle."""

import contextlib
import http.client
import json
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults import damage, oracle, process
from tests.faults.board import Action, Armed
from tests.faults.children import Child, Late
from tests.faults.databases import JOURNAL_SCHEMA, Files, Servers, is_server, read_now
from tests.faults.process import World
from tests.faults.schedules import Fault, Schedule

if TYPE_CHECKING:
    from tests.faults.lane import Lane

START_SECONDS = 30.0
SCRIPT_SECONDS = 60.0
SETTLE_SECONDS = 40.0
RETRY_SECONDS = 0.03
STARTS_MAX = 8
FILE_BYTES_LEAST = 16_384
STEP_SECONDS = 55
"""How far the escrow's clock goes at once: a longer step would look like an outage to it."""
_TRACEBACK = re.compile(r"^Traceback .*\n(?:[ ].*\n)*(\S.*)", re.MULTILINE)


@dataclass
class Run:
    """What happened in one schedule. `problems` are what must not be."""

    schedule: Schedule
    folder: Path
    problems: list[str] = field(default_factory=list)
    fired: set[str] = field(default_factory=set)
    seconds: float = 0.0
    figures: dict[str, int] = field(default_factory=dict)
    passed: list[int] = field(default_factory=list)


class Story:
    """How one schedule goes."""

    def __init__(self, lane: "Lane", run: Run, world: World) -> None:
        self.lane, self.run, self.world = lane, run, world
        self.board, self.family, self.schedule = lane.board, lane.family, run.schedule
        self.family.on_end, self.family.on_tick = self._ended, self._tick
        self.alive: dict[str, Child] = {}
        self.began = time.monotonic()
        self.failed_starts = 0
        self.settling = self.over = False
        self._slots: dict[int, Fault] = {}
        self._pauses: dict[str, float] = {}
        self._done: set[str] = set()
        self._hurting: dict[str, Fault] = {}
        self._damaged: list[Fault] = []

    @property
    def providers(self) -> list[str]:
        return [f"provider{number}" for number in range(self.schedule.workers)]

    @property
    def buyers(self) -> list[str]:
        return [f"buyer{number}" for number in range(self.schedule.buyers)]

    def _names(self, role: str) -> list[str]:
        return {"provider": self.providers, "buyer": self.buyers}.get(role, [role])

    def _buying(self) -> set[str]:
        return set(self.buyers) & self.alive.keys()

    def tell(self) -> None:
        """From the first start to the last question."""
        self.lane.route(self.schedule.workers, [])
        if self.schedule.armed_at_start:
            self._arm()
        for name in ("escrow", *self.providers):
            self._start(name)
            self._await_ready(name)
        self.lane.route(self.schedule.workers, self.schedule.faults)
        if not self.schedule.armed_at_start:
            self._arm()
        self._break_in_time()
        for name in self.buyers:
            self._start(name)
        self.family.wait(
            lambda: len(self._done) == self.schedule.buyers, SCRIPT_SECONDS, "the script"
        )
        self.note("the script is done")
        if self.schedule.gone:
            self._let_provider_redeem()
            self._pass_time(armed=True)
        self._heal()
        self._settle()
        self._judge()
        for fault in self._damaged:
            self._open_damaged(fault)

    def _judge(self) -> None:
        """Asks the oracle, in a process of its own: it may run an event loop."""
        verdict = self.world.folder / "verdict.json"

        def judge(_pipe: int) -> None:
            parties = (self.lane.buyer.agent_id, self.lane.seller.agent_id)
            verdict.write_text(json.dumps(oracle.judge(self.schedule, self.world, parties)))

        child = self.family.fork("oracle", self.world.folder / "oracle.log", judge)
        self.family.wait(lambda: not child.alive, SETTLE_SECONDS, "the oracle")
        if child.status:
            raise RuntimeError((self.world.folder / "oracle.log").read_text()[-2000:])
        problems, self.run.figures = json.loads(verdict.read_text())
        self.run.problems += problems
        for log in sorted(self.world.folder.glob("*.log")):
            for error in _TRACEBACK.findall(log.read_text("utf-8", "replace")):
                key = f"tracebacks of {log.stem.rstrip('0123')}: {error[:70]}"
                self.run.figures[key] = self.run.figures.get(key, 0) + 1

    def note(self, event: str) -> None:
        """Writes a line of the story's own log, with the seconds since its beginning."""
        since = time.monotonic() - self.began
        with (self.world.folder / "story.log").open("a") as log:
            log.write(f"{since:7.3f} {event}\n")

    # Starting and ending.

    def _start(self, name: str) -> None:
        work: Callable[[int], None]
        if name == "escrow":
            work = partial(process.escrow, self.world, self.board)
        elif name in self.buyers:
            number = int(name.removeprefix("buyer"))
            script = {
                "groups": self.schedule.groups,
                "number": number,
                "buyers": self.schedule.buyers,
            }
            work = partial(process.buyer, self.world, self.board, script=script)
        else:
            number = int(name.removeprefix("provider"))
            work = partial(process.provider, self.world, self.board, worker=number)
        log = self.world.folder / f"{name}.log"
        self.note(f"start {name}")
        self.alive[name] = self.family.fork(name, log, lambda pipe: work(ready=pipe))

    def _await_ready(self, name: str) -> None:
        def ready() -> bool:
            child = self.alive.get(name)
            return child is not None and bool(child.said)

        self.family.wait(ready, START_SECONDS, f"the start of {name}")
        self.note(f"{name} is ready")

    def _ended(self, child: Child) -> None:
        """Somebody died: starts it again after the pause its fault wants, unless that is all."""
        if self.alive.get(child.name) is not child:
            return
        del self.alive[child.name]
        self.note(f"{child.name} ended with {child.status}, after {child.seconds:.3f} s of work")
        if child.said and child.name in self.buyers:
            self._done.add(child.name)
        self._note_fired()
        self._take_copy(child)
        if self.over or (child.name in self.buyers and child.status == 0):
            return
        if child.status not in (-signal.SIGKILL, -signal.SIGTERM, 0):
            self._died(child)
        if child.name in self.providers and self.board.provider_gone:
            return
        pause = self._pauses.pop(child.name, RETRY_SECONDS)
        self.family.after(0.0 if self.settling else pause, partial(self._again, child.name))

    def _again(self, name: str) -> None:
        if name not in self.alive and not self.over:
            self._start(name)

    def _died(self, child: Child) -> None:
        """A process may refuse to start while something is broken, and nothing else."""
        if child.said and child.name not in self.buyers:
            self.run.problems.append(f"{child.name} ended by itself with {child.status}")
        elif self.settling or child.name in self.buyers:
            self.failed_starts += 1
            if self.failed_starts > STARTS_MAX:
                raise Late(f"{child.name} does not start (status {child.status}); starting")

    def _stop(self, names: list[str], number: signal.Signals) -> None:
        """Ends processes for good."""
        self.over = True
        for name in names:
            if name in self.alive:
                self.alive[name].send(number)
        self.family.wait(
            lambda: not set(names) & set(self.alive), SETTLE_SECONDS, f"the end of {names}"
        )
        self.over = False

    # Breaking.

    def _arm(self) -> None:
        for slot, fault in enumerate(self.schedule.faults):
            if fault.family == "point":
                self._slots[slot] = fault
                armed = Armed(fault.point, fault.side, fault.nth, fault.action)
                self.board.arm(slot, armed)

    def _break_in_time(self) -> None:
        for fault in self.schedule.faults:
            act = getattr(self, f"_do_{fault.family}", None)
            if act is not None:
                self.family.after(fault.at, partial(act, fault))

    def _victim(self, fault: Fault) -> Child | None:
        names = self._names(fault.role)
        child = self.alive.get(names[int(fault.at * 1000) % len(names)])
        if child is not None:
            self.run.fired.add(fault.label)
            self.note(fault.label)
        return child

    def _do_kill(self, fault: Fault, number: signal.Signals = signal.SIGKILL) -> None:
        child = self._victim(fault)
        if child is not None:
            self._pauses[child.name] = fault.after
            child.send(number)

    def _do_stop(self, fault: Fault) -> None:
        self._do_kill(fault, signal.SIGTERM)

    def _do_stall(self, fault: Fault) -> None:
        child = self._victim(fault)
        if child is not None:
            child.send(signal.SIGSTOP)
            self.family.after(fault.after, partial(child.send, signal.SIGCONT))

    def _do_clock(self, fault: Fault) -> None:
        seconds = (fault.more or {})["by"]
        self.run.fired.add(fault.label)
        self.board.shift(fault.role, seconds)
        self.family.after(fault.after, partial(self.board.shift, fault.role, -seconds))

    def _do_full(self, fault: Fault) -> None:
        """No file of the process grows any more: what a full disk does to a database."""
        child, path = self._victim(fault), self._place_of(fault.role)
        if child is None:
            return
        sizes = [_size(Path(f"{path}{end}")) for end in ("", "-wal")]
        most = max(*sizes, FILE_BYTES_LEAST)
        _limit(child, most)
        self.family.after(fault.after, partial(_limit, child, resource.RLIM_INFINITY))

    def _do_reprice(self, fault: Fault) -> None:
        """The provider is started anew with other prices, one worker after the other."""
        self.board.dearer = True
        self.run.fired.add(fault.label)
        number = signal.SIGKILL if fault.role == "buyer" else signal.SIGTERM
        for place, name in enumerate(self.providers):
            self._pauses[name] = fault.after
            self.family.after(place * fault.after, partial(self._send, name, number))

    def _send(self, name: str, number: signal.Signals) -> None:
        if name in self.alive:
            self.alive[name].send(number)

    def _do_rotate(self, fault: Fault) -> None:
        """The escrow signs with another key from now on."""
        self.run.fired.add(fault.label)
        log = self.world.folder / "rotator.log"
        self.family.fork("rotator", log, lambda _: process.rotate_keys(self.world, self.board))

    def _do_corrupt(self, fault: Fault) -> None:
        """Kills a process, and takes a copy of the file it leaves, to be damaged and opened."""
        if not is_server(self._place_of(fault.role)):
            self._hurting[fault.role] = fault
            self._do_kill(fault)

    def _take_copy(self, child: Child) -> None:
        fault = self._hurting.pop(child.name.rstrip("0123"), None)
        if fault is None or fault.role in {other.role for other in self._damaged}:
            return
        if damage.take(self.world.folder, fault.role, (fault.more or {})["where"]):
            self._damaged.append(fault)

    def _open_damaged(self, fault: Fault) -> None:
        """Opens the damaged copy, and notes what became of it."""
        role, place = fault.role, self.world.folder / f"damaged-{fault.role}"
        port = self.lane.ports.spare
        life = damage.opener(role, self.world, self.board, place, port)
        child = self.family.fork("opener", self.world.folder / f"damaged-{role}.log", life)
        self.family.wait(lambda: bool(child.said) or not child.alive, START_SECONDS, "an opening")
        opened = bool(child.said)
        if child.alive:
            child.send(signal.SIGKILL)
        elif (child.status or 0) < 0:
            self.run.problems.append(f"a damaged file ended the {role} with {child.status}")
        self.family.wait(lambda: not child.alive, START_SECONDS, "the end of an opening")
        word, problems = damage.judge(place, role, opened=opened)
        self.run.problems += problems
        self.run.figures[f"damaged and {word} ({role})"] = 1

    def _do_locked(self, fault: Fault) -> None:
        """Somebody else holds the database's write lock for a while."""
        place = self._place_of(fault.role)
        self.run.fired.add(fault.label)
        databases = self.lane.databases if fault.role != "buyer" else Files(self.world.folder)
        log = self.world.folder / "locker.log"
        hold = partial(databases.hold_lock, place, fault.role, fault.after)
        self.family.fork("locker", log, lambda _: hold())

    def _do_server(self, fault: Fault) -> None:
        """The database server loses its connections, or is restarted, or dies."""
        databases, kind = self.lane.databases, (fault.more or {})["kind"]
        if isinstance(databases, Servers):
            self.note(fault.label)
            self.run.fired.add(fault.label)
            if kind == "cut":
                databases.cut(self.world.escrow_db)
            elif kind == "crash":
                databases.crash()
            else:
                databases.restart()

    def _place_of(self, role: str) -> str:
        places = {"escrow": self.world.escrow_db, "provider": self.world.journal}
        return places.get(role, str(self.world.folder / "wallet.db"))

    def _tick(self) -> None:
        self._done |= {name for name in self._buying() if self.alive[name].said}
        self._note_fired()
        if self.board.provider_gone and not self.settling:
            for name in self.providers:
                if name in self.alive:
                    self.alive[name].send(signal.SIGKILL)

    def _note_fired(self) -> None:
        for slot, fault in list(self._slots.items()):
            if not self.board.fired(slot):
                continue
            del self._slots[slot]
            self.run.fired.add(fault.label)
            self.note(f"{fault.action.name} at {fault.label}")
            for name in self._names(fault.role):
                self._pauses[name] = fault.after
                child = self.alive.get(name)
                if fault.action is Action.STALL and child is not None:
                    self.family.after(fault.after, partial(child.send, signal.SIGCONT))

    # Healing, and the end.

    def _heal(self) -> None:
        """Ends every fault; some are killed once more, so that they start from what they wrote."""
        self.run.fired.update(self.lane.spoiled(reset=bool(self.schedule.restarts)))
        self._note_fired()
        self.board.disarm()
        self.board.set_right()
        self.board.provider_gone = False
        self.family.forget_timers()
        for child in self.family.children:
            _limit(child, resource.RLIM_INFINITY)
            child.send(signal.SIGCONT)
        killed = [name for name in self.alive if name.rstrip("0123") in self.schedule.restarts]
        self._stop(killed, signal.SIGKILL)
        self.settling = True
        for name in ("escrow", *self.providers, *self.buyers):
            if name not in self.alive:
                self._start(name)
        self.board.settling = True

    def _settle(self) -> None:
        for name in ("escrow", *self.providers):
            self._await_ready(name)
        self.family.wait(lambda: not self._buying(), SETTLE_SECONDS, "the buyers' end")
        self._stop(self.providers, signal.SIGTERM)
        if self._owed():
            self._let_provider_redeem()
        self._pass_time(armed=False)
        self._stop(["escrow"], signal.SIGKILL)
        self.over = True

    def _let_provider_redeem(self) -> None:
        """One more life of the provider, long enough to hand in what is owed."""
        self.board.provider_gone = False
        for name in self.providers:
            if name not in self.alive:
                self._start(name)
            self._await_ready(name)
        deadline = time.monotonic() + 2.5
        with contextlib.suppress(Late):
            self.family.wait(lambda: not self._owed() or time.monotonic() > deadline, 3, "")
        self._stop(self.providers, signal.SIGTERM)

    def _owed(self) -> int:
        query = (
            "SELECT coalesce(sum(charged), 0) AS owed FROM sessions"
            " WHERE charged > redeemed AND charged > released AND written_off IS NULL"
        )
        (row,) = read_now(self.world.journal, JOURNAL_SCHEMA, query)
        return int(row["owed"])

    def _pass_time(self, *, armed: bool) -> None:
        """Lets the time of closing sessions come.

        The first step may be long, and counts as an outage; after it the service runs on.
        """
        for _ in range(60):
            closing = self._closing(armed=armed)
            if not closing:
                return
            now, deadline = self.board.clock("escrow")(), closing[0]["closing_deadline"]
            self.board.shift("escrow", max(STEP_SECONDS, deadline - now))
            self._ask(armed, f"/changes?journal={closing[0]['journal']}&serial=0")

    def _closing(self, *, armed: bool) -> list[dict[str, Any]]:
        answer = self._ask(armed, "/escrow?role=provider&limit=100")
        return [one for one in answer["items"] if one["status"] == "closing"]

    def _ask(self, armed: bool, path: str) -> Any:
        """Asks the escrow, again and again while it may still be killed."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                answer = self.lane.ask("GET", path, self.lane.seller)
                if "items" in answer or "changes" in answer:
                    return answer
            except (OSError, ValueError, http.client.HTTPException):
                pass
            if time.monotonic() > deadline:
                raise Late("an answer of the escrow")
            self.family.wait(_once(), 1, "")


def _once() -> Callable[[], bool]:
    """False once, then true: one turn of the loop."""
    turns: Iterator[bool] = iter((False, True))
    return lambda: next(turns)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _limit(child: Child, size: int) -> None:
    if child.alive:
        with contextlib.suppress(ProcessLookupError):
            _, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size, hard))
