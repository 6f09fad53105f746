"""Schedules: what is bought, and what goes wrong meanwhile, all drawn from one seed.

The same seed gives the same schedule for ever, as long as the tables of points and faults are the
same; what the machine does between its processes is not in our hands, so a replay may take a few
attempts.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

from tests.faults.board import ROLES, SIDES, Action
from tests.faults.points import POINTS, Point
from tests.faults.proxy import ANSWER_KINDS, GARBAGE, KINDS, REQUEST_KINDS

Step = dict[str, Any]
CALLS = ("item", "item", "item", "words", "words", "stream", "big", "broken", "refuse")
LINKS = ("buyer-provider", "buyer-escrow", "provider-escrow")
HEADERS = {
    "buyer-provider": (
        ("PAYMENT-SIGNATURE", "Host"),
        ("PAYMENT-RESPONSE", "PAYMENT-REQUIRED", "Cache-Control", "Content-Length", "Retry-After"),
    ),
    "buyer-escrow": (("Authorization",), ("Date", "Content-Type", "Content-Length")),
    "provider-escrow": (("Authorization",), ("Date", "Content-Type", "Content-Length")),
}
"""Headers that are stripped or altered, of requests and of answers."""
OFTEN = ("", "/item", "/changes")
MATCHES = {
    "buyer-provider": (*OFTEN[:2], "", "/x402mw/control", "/stream", "/words"),
    "buyer-escrow": ("/escrow ", "/escrow ", "/topup", "/release", "-keys", "GET /api"),
    "provider-escrow": ("/redeem", "/redeem", "/changes", "/journals", ""),
}
"""What a fault of a link may be for: a part of the request's first line."""

FAMILIES = {
    "point": 60, "kill": 8, "stall": 4, "proxy": 25, "clock": 6, "full": 5, "locked": 4,
    "corrupt": 3, "reprice": 3, "rotate": 3,
}  # fmt: skip
"""How often each family of faults is drawn, in parts of their sum."""


@dataclass(frozen=True)
class Setting:
    """What a run is about: the database of journal and escrow.

    With a `focus` every schedule has a fault whose label contains it.
    """

    database: str = "sqlite"
    focus: str = ""


@dataclass
class Fault:
    """One thing that goes wrong. `label` is what the summary counts it under.

    `at` is when (seconds after the buyer begins), `after` how long until it is healed: a dead
    process restarted, a stopped one continued, a full disk freed.
    """

    family: str
    label: str
    at: float = 0.0
    after: float = 0.0
    role: str = ""
    point: int = 0
    side: int = 0
    nth: int = 1
    action: Action = Action.KILL
    more: dict[str, Any] | None = None


@dataclass
class Schedule:
    """One schedule. `restarts` names who is killed once more when the faults are over."""

    seed: str
    database: str
    workers: int
    buyers: int
    threads: bool
    groups: list[list[Step]]
    faults: list[Fault]
    armed_at_start: bool
    proxied: frozenset[str]
    redeem_seconds: int
    read_seconds: float
    durability: Literal["fsync", "process"]
    deposit: str
    restarts: tuple[str, ...]
    gone: bool


def draw(seed: str, setting: Setting) -> Schedule:
    """Makes the schedule of a seed."""
    dice = random.Random(seed)
    workers = dice.choice((1, 1, 2, 3))
    faults = [
        _fault(dice, setting.database)
        for _ in range(dice.choices((1, 2, 3, 6), (50, 30, 18, 2))[0])
    ]
    while setting.focus not in " ".join(fault.label for fault in faults):
        faults[0] = _fault(dice, setting.database)
    needs = {POINTS[fault.point].needs for fault in faults if fault.family == "point"}
    if "replay" in needs:
        faults.append(_proxied(dice, "buyer-provider", "drop_answer"))
    if "others" in needs:
        workers = max(2, workers)
    if needs & {"restart", "others"}:
        faults.append(Fault("kill", "kill provider", dice.uniform(0.02, 0.2), 0.02, "provider"))
    if "stop" in needs:
        faults.append(Fault("stop", "stop provider", dice.uniform(0.05, 0.3), 0.02, "provider"))
    crash = any(fault.label == "database crash" for fault in faults)
    links = {fault.more["link"] for fault in faults if fault.family == "proxy" and fault.more}
    return Schedule(
        seed=seed,
        database=setting.database,
        workers=workers,
        buyers=1 if "gone" in needs else dice.choice((1, 1, 2)),
        threads=dice.random() < 0.25,
        groups=_groups(dice, needs),
        faults=faults,
        armed_at_start="start" in needs,
        proxied=frozenset(links | {link for link in LINKS if dice.random() < 0.3}),
        redeem_seconds=dice.choice((0, 0, 1, 30)),
        read_seconds=dice.choice((0.3, 1.0, 1.0, 3.0)),
        # What only survives its own process may be lost with the database's.
        durability="process" if dice.random() < 0.5 and not crash else "fsync",
        deposit="0.50" if "topup" in needs else dice.choice(("0.50", "1.00", "5.00")),
        restarts=tuple(role for role in ROLES if dice.random() < 0.4),
        gone="gone" in needs,
    )


# What is bought.


def _groups(dice: random.Random, needs: set[str]) -> list[list[Step]]:
    most = dice.choices((8, 16, 30, 80), (50, 30, 10, 3))[0]
    groups, calls = [], 0
    while calls < most:
        width = min(dice.choice((1, 1, 2, 3, 5, 8, most // 2)), most - calls)
        groups.append([_call(dice, needs) for _ in range(width)])
        calls += width
        if dice.random() < 0.1:
            groups.append([_between(dice)])
    if "release" in needs:
        groups.insert(dice.randrange(1, len(groups) + 1), [{"kind": "release"}])
    if "time" in needs:
        passing = {"kind": "time", "roles": ROLES, "seconds": 440}
        groups.insert(dice.randrange(1, len(groups) + 1), [passing])
        groups.append([_call(dice, needs)])
    if "gone" in needs:
        groups.append([{"kind": "gone"}])
    groups.append([{"kind": "close"}])
    if "gone" not in needs and dice.random() < 0.2:
        groups.append([_call(dice, needs), _call(dice, needs)])
    return groups


def _call(dice: random.Random, needs: set[str]) -> Step:
    kind = dice.choice(CALLS)
    if "topup" in needs:
        kind = dice.choice(("item", "item", kind))
    if "stream" in needs and dice.random() < 0.5:
        kind = "stream"
    size = {"words": dice.randint(0, 600), "stream": dice.randint(1, 40)}.get(kind, 0)
    slow = {"stream": (0, 1, 3)}.get(kind, (0, 0, 0, 5, 20))
    return {"kind": kind, "size": size, "ms": dice.choice(slow)}


def _between(dice: random.Random) -> Step:
    kind = dice.choice(("release", "close", "time"))
    return {"kind": kind, "roles": ROLES, "seconds": dice.choice((50, 440, 700))}


# What goes wrong.


def _fault(dice: random.Random, database: str) -> Fault:
    family = dice.choices(tuple(FAMILIES), tuple(FAMILIES.values()))[0]
    role = dice.choice(ROLES)
    at = dice.uniform(0, 0.25)
    match family:
        case "point":
            return _point(dice)
        case "kill":
            return Fault(family, f"kill {role}", at, _pause(dice), role)
        case "stall":
            return Fault(family, f"stall {role}", at, dice.choice((0.05, 0.2, 0.5, 1.0)), role)
        case "proxy":
            return _proxied(dice, dice.choice((LINKS[0], *LINKS)), dice.choice(KINDS))
        case "clock":
            seconds = dice.choice((-86_400, -3600, -700, -200, -45, 45, 200, 700, 3600, 90_000))
            label = f"clock {role} {'ahead' if seconds > 0 else 'back'}"
            return Fault(family, label, at, dice.uniform(0.1, 0.6), role, more={"by": seconds})
        case "full" if database != "sqlite" and role != "buyer":
            kind = dice.choice(("cut", "cut", "restart", "crash"))
            return Fault("server", f"database {kind}", at, more={"kind": kind})
        case "full" | "locked":
            return Fault(family, f"{family} {role}", at, dice.uniform(0.05, 0.4), role)
        case "reprice" | "rotate":
            return Fault(family, family, at, _pause(dice), role)
        case _:
            where = dice.randrange(1 << 30)
            return Fault(family, f"{family} {role}", at, 0.02, role, more={"where": where})


def _pause(dice: random.Random) -> float:
    """How long somebody stays dead."""
    return dice.choice((0.0, 0.02, 0.1, 0.4))


def _point(dice: random.Random) -> Fault:
    number = dice.randrange(len(POINTS))
    point, side = POINTS[number], dice.randrange(2)
    action = dice.choices((Action.KILL, Action.STALL, Action.ERROR), (8, 2, 3))[0]
    if action is Action.ERROR and not point.error:
        action = Action.KILL
    return Fault(
        "point",
        f"{point.name} {SIDES[side]}",
        after=_pause(dice) if action is not Action.STALL else dice.choice((0.05, 0.2, 0.5, 1.0)),
        role=point.role,
        point=number,
        side=side,
        nth=_nth(dice, point),
        action=action,
    )


def _nth(dice: random.Random, point: Point) -> int:
    step = point.name.split(".")[1]
    if step in ("start", "open", "close", "register", "stop", "release", "refund", "topup"):
        return dice.choice((1, 1, 1, 2))
    return dice.choice((1, 1, 2, 3, 5, 8))


def _proxied(dice: random.Random, link: str, kind: str) -> Fault:
    asked, answered = HEADERS[link]
    match = dice.choice(MATCHES[link])
    more = {
        "link": link,
        "kind": kind,
        "nth": dice.choice((1, 1, 2, 3, 5, 8)) if match in OFTEN else dice.choice((1, 1, 2)),
        "match": match,
        "name": dice.choice(asked if kind in REQUEST_KINDS else answered),
        "arg": dice.randrange(600),
    }
    if kind.startswith("garbage"):
        more["arg"] = dice.randrange(len(GARBAGE))
    elif kind == "cut_answer":
        more["arg"] = dice.randrange(3000)
    elif kind == "replay_later":
        more["arg"] = dice.choice((20, 100, 300, 600))
    assert kind in REQUEST_KINDS or kind in ANSWER_KINDS
    return Fault("proxy", f"{link} {kind}", more=more)
