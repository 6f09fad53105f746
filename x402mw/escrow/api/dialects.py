"""The two dialects of the API: what the base path `/api` answers beside the canonical fields.

Under `/api` an escrow also has the names of the first guides, among them amounts as JSON numbers,
which callers compare and format. They are written digit by digit: no number passes through float.
"""

import json
from typing import Any

from starlette.requests import Request

from x402mw.core.strict import dumps
from x402mw.escrow.idempotency import Answer

BASES = ("/api/v1", "/api")
_NUMBERS = {
    "amount_usdc": "amount",
    "balance_usdc": "remaining",
    "released_usdc": "released",
    "refunded_usdc": "refunded",
}
_NAMES = {"provider": "to_agent_id", "recipient": "to_agent_id", "description": "memo"}


_RELEASE, _PART = "/release", "-partial"


def plain_path(request: Request) -> str:
    """The path that stands for all spellings of an operation: no key pays once by each of them."""
    path: str = request.scope["path"]
    if not path.startswith(f"{BASES[0]}/"):
        path = BASES[0] + path.removeprefix(BASES[1])
    return path.removesuffix(_PART) if path.endswith(_RELEASE + _PART) else path


def speak(request: Request, answer: Answer) -> Answer:
    """The answer in the dialect that the request was made in."""
    if answer.status >= 400 or request.scope["path"].startswith(f"{BASES[0]}/"):
        return answer
    return Answer(answer.status, _write(json.loads(answer.body)), answer.replayed)


def _write(value: dict[str, Any]) -> str:
    if "items" in value:
        items = ",".join(_write(item) for item in value["items"])
        rest = dumps({name: part for name, part in value.items() if name != "items"}).decode()
        return f'{{"items":[{items}]{_more(rest)}'
    if "agreement" in value:
        rest = dumps({name: part for name, part in value.items() if name != "agreement"}).decode()
        return f'{{"agreement":{_write(value["agreement"])}{_more(rest)}'
    if "escrow_id" not in value or "remaining" not in value:
        return dumps(value).decode()
    names = {own: value[other] for own, other in _NAMES.items()}
    numbers = ",".join(f'"{own}":{value[other]}' for own, other in _NUMBERS.items())
    return f"{dumps({**value, **names}).decode()[:-1]},{numbers}}}"


def _more(rest: str) -> str:
    """The members of an object, to be joined to others that were written before."""
    return "}" if rest == "{}" else "," + rest[1:]
