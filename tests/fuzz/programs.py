"""Inputs of the service targets: small programs in JSON, and how they are bent.

A program is a list of steps. Texts that begin with "$" stand for what only the running service
knows (`$session`, `$voucher:1.50`), so that a program means the same to every fresh service.
"""

from random import Random
from typing import Any

from tests.fuzz.mutators import bend_json, bend_text, flip, read_json
from tests.provider.spellings import spellings
from tests.support import payments
from x402mw.core.strict import b64url_encode, dumps

STEPS_MAX = 6
KEY = b64url_encode(payments.BUYER_KEY)
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "get", "", "PATCH", "TRACE", "QUERY"]
FIELDS = ["host", "payment-signature", "content-length", "accept", "authorization", "cookie", "te"]
FIELDS += [
    "idempotency-key",
    "content-type",
    "x-forwarded-for",
    "x-http-method-override",
    "",
    "expect",
]
FIELD_VALUES = [
    "",
    "api.example.com",
    "localhost",
    "127.0.0.1:1",
    "[::1]",
    "text/html",
    "*/*",
    "0",
    "-1",
]
FIELD_VALUES += [
    "9" * 400,
    "GET",
    "application/json",
    "api.example.com:443",
    "\xff",
    "a" * 5000,
    "evil",
]


def step(who: str, method: str, path: str, body: Any = None, **more: Any) -> dict[str, Any]:
    """One request to the escrow, `who` being an agent of the world."""
    return {"as": who, "method": method, "path": path, "body": body, **more}


OPEN = {"to_agent_id": "$provider", "amount": "5.00", "session_key": KEY, "journal": "$journal"}
REDEEM = {
    "journal": "$journal",
    "serial": 1,
    "items": [{"voucher": "$voucher:1.50", "amount": "1.00"}],
}
CLOSING = [{"amount": "0", "final": True, "escrow_id": "$session"}]
ESCROW_STEPS: list[dict[str, Any]] = [
    step("", "POST", "/api/v1/agents", {"name": "someone"}),
    step("buyer", "GET", "/api/v1/agents/me"),
    step("buyer", "POST", "/api/v1/faucet/claim", {}),
    step("provider", "PUT", "/api/v1/journals/jr_" + "2" * 32, {"receipt_key": KEY}),
    step(
        "buyer",
        "POST",
        "/api/v1/escrow",
        {**OPEN, "expires_in_seconds": 1800, "memo": "m"},
        key="a",
    ),
    step("buyer", "GET", "/api/v1/escrow", query="role=buyer&status=active&limit=2&after=1"),
    step("provider", "GET", "/api/v1/escrow/$session"),
    step("buyer", "POST", "/api/v1/escrow/$session/token", {}),
    step("buyer", "POST", "/api/v1/escrow/$session/topup", {"amount": "2.5"}, key="b"),
    step("buyer", "POST", "/api/v1/escrow/$session/release", {"cumulative": "1.25"}),
    step(
        "provider",
        "POST",
        "/api/v1/escrow/$session/close",
        {"voucher": "$voucher:2", "amount": "2"},
    ),
    step("buyer", "POST", "/api/v1/escrow/$session/close", {}, key="c"),
    step("provider", "POST", "/api/v1/redeem", REDEEM, key="d"),
    step("provider", "POST", "/api/v1/redeem", {**REDEEM, "items": CLOSING}),
    step("provider", "GET", "/api/v1/changes", query="journal=$journal&serial=3&since=0&limit=5"),
    step("", "GET", "/health"),
    step("", "GET", "/.well-known/x402mw-keys"),
]
WAITS = [1, 59, 61, 700, 1801, 90_000, 10_000_000]


def escrow_seeds() -> list[bytes]:
    """Each route by itself, and a whole life of a session."""
    life = [ESCROW_STEPS[at] for at in (8, 12, 9)]
    end = [ESCROW_STEPS[11], {"wait": 700}, ESCROW_STEPS[13], ESCROW_STEPS[9]]
    return [dumps([one]) for one in ESCROW_STEPS] + [dumps(life), dumps(end)]


def bend_escrow(data: bytes, draw: Random) -> bytes:
    """Adds, drops or repeats steps, or bends one of them."""
    steps = read_json(data)
    if not isinstance(steps, list) or not all(isinstance(one, dict) for one in steps):
        return flip(data, draw)
    act = draw.randrange(8)
    if act == 0 or not steps:
        extra = draw.choice([*ESCROW_STEPS, {"wait": draw.choice(WAITS)}])
        steps.insert(draw.randrange(len(steps) + 1), extra)
        return dumps(steps[-STEPS_MAX:])
    at = draw.randrange(len(steps))
    if act == 1:
        steps.append(steps[at])
    elif act == 2:
        del steps[at]
    elif act == 3:
        steps[at] = bend_json(steps[at], draw)
    elif act == 4:
        path = str(steps[at].get("path", "/"))
        steps[at]["path"] = draw.choice(spellings(path, least=0) or [path])
    elif act == 5:
        steps[at]["query"] = bend_text(str(steps[at].get("query", "")), draw)
    elif act == 6:
        steps[at]["as"] = draw.choice(
            ("", "buyer", "provider", "stranger", "Bearer \xff", "Bearer")
        )
    else:
        steps[at]["body"] = bend_json(steps[at].get("body"), draw, times=draw.choice((1, 1, 2)))
    return _write(steps[-STEPS_MAX:])


def _write(program: Any) -> bytes:
    try:
        return dumps(program)
    except Exception:
        return bend_text("[]", Random(0)).encode("utf-8", "replace")


def call(method: str, target: str, **more: Any) -> dict[str, Any]:
    """One request to a provider; `pay` are fields of its payment, if it has one."""
    return {"method": method, "target": target, "headers": [], "body": [""], **more}


PAY = {"route": "GET /quote/{symbol}", "target": "/quote/BTC", "seq": 1, "cumulative": 1000}
METER = {
    "route": "POST /summarize",
    "target": "/summarize",
    "seq": 2,
    "cumulative": 8100,
    "body": "x",
}
CONTROLS = ['{"op":"receipt","seq":"1"}', '{"op":"receipt"}', '{"op":"close"}', "{}"]
SHOP_CALLS: list[dict[str, Any]] = [
    call("GET", "/quote/BTC"),
    call("HEAD", "/quote/BTC?x=1"),
    call("GET", "/free"),
    call("GET", "/quote/BTC", pay=PAY),
    call("POST", "/summarize", pay=METER, body=["x"]),
    call("POST", "/x402mw/control", pay={"control": CONTROLS[0], "seq": 3}, body=[CONTROLS[0]]),
    call("GET", "/quote/BTC", pay={**PAY, "binding": 1}, root="/api"),
    call("GET", "/free", pay=PAY),
    call("POST", "/summarize", body=["ab", None]),
]


def shop_seeds() -> list[bytes]:
    """Each kind of request by itself, a retry, and two calls of one session."""
    pairs = [[SHOP_CALLS[3], SHOP_CALLS[3]], [SHOP_CALLS[3], SHOP_CALLS[5], SHOP_CALLS[4]]]
    return [dumps([one]) for one in SHOP_CALLS] + [dumps(pair) for pair in pairs]


def bend_shop(data: bytes, draw: Random) -> bytes:
    """Adds, drops or repeats requests, or bends the scope, body or payment of one."""
    calls = read_json(data)
    if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
        return flip(data, draw)
    act = draw.randrange(10)
    if act == 0 or not calls:
        calls.append(draw.choice(SHOP_CALLS))
        return dumps(calls[-STEPS_MAX:])
    at = draw.randrange(len(calls))
    if act == 1:
        calls.append(calls[at])
    elif act == 2:
        del calls[at]
    else:
        calls[at] = _bend_call(calls[at], draw)
    return _write(calls[-STEPS_MAX:])


def _bend_call(one: dict[str, Any], draw: Random) -> Any:
    """Bends one request, most often where it matters."""
    path, control = str(one.get("target", "/"))[:200], draw.choice(CONTROLS)
    pay, fields = one.get("pay"), [draw.choice(FIELDS), draw.choice(FIELD_VALUES)]
    signed = draw.choice((PAY, METER, {"control": control, "seq": draw.randrange(9)}, None))
    bodies: tuple[Any, ...] = ([], ["", ""], [None], ["x" * 5000], ["{", "}"], CONTROLS)
    changes: list[dict[str, Any]] = [
        {"method": draw.choice(METHODS)},
        {"target": draw.choice(spellings(path, least=0) or [path])},
        {"headers": [*_listed(one.get("headers")), fields][-8:]},
        {"pay": signed, "body": [control]},
        {"body": draw.choice(bodies)},
        {"pay": bend_json(pay, draw) if isinstance(pay, dict) else PAY},
        {"root": draw.choice((None, "/api"))},
    ]
    change = draw.randrange(len(changes) + 1)
    return one | changes[change] if change < len(changes) else bend_json(one, draw)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
