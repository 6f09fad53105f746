"""The OpenAPI document: what the route table, the models and the catalogue of problems say.

There is no second list: whatever is served is described, and the tests of the escrow hold every
answer they see against the table.
"""

import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from x402mw.escrow.api.dialects import BASES
from x402mw.escrow.api.routes import Route
from x402mw.escrow.idempotency import KEY_CHARACTERS_MAX
from x402mw.escrow.problems import PROBLEMS
from x402mw.escrow.web import PROBLEM_TYPE

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
CLOSING = {"internal", "unavailable"}
WRITING = ("POST", "PUT", "DELETE")
_PARAMETER = re.compile(r"\{(\w+)\}")
_HEX = "[0-9a-f]{32}"
_IN_PATHS = {
    "escrow_id": f"^esc_{_HEX}$",
    "agent_id": f"^ag_{_HEX}$",
    "journal": f"^jr_{_HEX}$",
    "key_id": f"^key_{_HEX}$",
    "transfer_id": f"^tr_{_HEX}$",
    "webhook_id": f"^wh_{_HEX}$",
    "event_id": r"^[0-9]{1,17}(\.[0-9]{1,17})?$",
    "handle": "^[a-z0-9-]{3,40}$",
}
ABOUT = """\
JSON both ways. Amounts are decimal strings in display units ("10.00"), times whole seconds UTC.
Bodies are strict: an unknown, misspelt or repeated member is refused, and so is a parameter.

Under `/api` everything is as under `/api/v1`, and escrows also have the names and numbers of the
first guides: `amount_usdc`, `balance_usdc`, `released_usdc`, `refunded_usdc`, `provider`,
`recipient`, `description`. In bodies of manual escrows and transfers `amount_usdc`, `provider`,
`recipient` and `description` are understood under both.

Lists have pages: `next` is the `after` of the following one, null on the last. A page of escrows in
one `status` may be short, or empty, and not be the last.

Send an `Idempotency-Key` with whatever moves money. After a lost answer or a 5xx, send the same
request with the same key again: it happens once, and the first answer is repeated. Keys are kept
for 7 days.

A refusal is a problem (RFC 9457) with a stable `code` and `advice`, what to do now. It has changed
nothing."""


def build(service: Iterable[Route], routes: Iterable[Route]) -> Schema:
    """The whole document."""
    service, routes = tuple(service), tuple(routes)
    kinds = [kind for route in (*service, *routes) for kind in (route.body, route.answer)]
    models = {model for kind in kinds for model in _members(kind) if model.model_fields}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, defined = models_json_schema(
        [(model, "validation") for model in ordered], ref_template=REFERENCE
    )
    paths: dict[str, Any] = {}
    for route in service:
        _add(paths, route).update({"servers": [{"url": "/"}], "tags": ["service"]})
    for route in routes:
        _add(paths, route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "x402mw escrow", "version": "1", "description": ABOUT},
        "servers": [{"url": base} for base in BASES],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**defined["$defs"], "Problem": PROBLEM},
        },
    }


PROBLEM: Schema = {
    "type": "object",
    "description": "Why a request was refused. Some codes have more members.",
    "properties": {
        "type": {"type": "string", "format": "uri"},
        "code": {"enum": sorted(PROBLEMS)},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "advice": {"type": "string"},
    },
    "required": ["type", "code", "title", "status", "detail", "advice"],
}


def _add(paths: dict[str, Any], route: Route) -> Schema:
    operation = _describe(route)
    paths.setdefault(route.path, {})[route.method.lower()] = operation
    return operation


def _describe(route: Route) -> Schema:
    scopes = route.scopes.split()
    operation: Schema = {
        "operationId": route.endpoint.__name__.strip("_"),
        "tags": [group_of(route)],
        "summary": route.summary,
        "parameters": _parameters(route),
        "responses": _responses(route),
        "x-scopes": scopes,
    }
    if route.also:
        operation["x-scopes-also"] = route.also.split()
    if not scopes:
        # Registration also looks at the key of an admin who asks.
        operation["security"] = [{}, {"key": []}] if "scope" in route.refusals.split() else []
    if (members := _members(route.body)) and any(model.model_fields for model in members):
        required = all(_required(model) for model in members)
        schema = _reference(route.body)
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": required, "content": content}
    return operation


def group_of(route: Route) -> str:
    """The first word of its path."""
    return next(word for word in route.path.strip("/").split("/"))


def _members(kind: Any) -> tuple[type[BaseModel], ...]:
    """The models of a union, or the one there is."""
    return () if kind is None else get_args(kind) or (kind,)


def _required(model: type[BaseModel]) -> bool:
    return any(field.is_required() for field in model.model_fields.values())


def _reference(kind: Any) -> Schema:
    options = [{"$ref": REFERENCE.format(model=model.__name__)} for model in _members(kind)]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _parameters(route: Route) -> list[Schema]:
    found: list[Schema] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "pattern": _IN_PATHS[name]},
        }
        for name in _PARAMETER.findall(route.path)
    ]
    query = route.query.model_json_schema()
    for name, schema in query.get("properties", {}).items():
        required = name in query.get("required", ())
        found.append({"name": name, "in": "query", "required": required, "schema": _plain(schema)})
    if is_keyed(route):
        key = {"type": "string", "minLength": 1, "maxLength": KEY_CHARACTERS_MAX}
        key["pattern"] = "^[ -~]+$"
        header = {"name": "Idempotency-Key", "in": "header", "schema": key}
        found.append({**header, "description": "A fresh one for whatever is to happen once more."})
    return found


def _plain(schema: Schema) -> Schema:
    """A parameter's schema: one that is absent is not null."""
    for option in schema.get("anyOf", ()):
        if option != {"type": "null"}:
            rest = {name: schema[name] for name in ("description",) if name in schema}
            return {**option, **rest}
    return {name: part for name, part in schema.items() if name != "title"}


def is_keyed(route: Route) -> bool:
    """Whether it looks at an Idempotency-Key."""
    return route.keyed and route.method in WRITING


def codes_of(route: Route) -> set[str]:
    """Every code that an operation may be refused with."""
    codes = CLOSING | {"invalid_request"} | set(route.refusals.split())
    if route.scopes:
        codes |= {"unauthorized", "scope"}
    if "{" in route.path:
        codes |= {"not_found"}
    if route.method in WRITING:
        codes |= {"malformed", "body_too_large", "body_timeout", "unsupported_media_type"}
    if is_keyed(route):
        codes |= {"idempotency_running", "idempotency_mismatch"}
    return codes


def _responses(route: Route) -> Schema:
    kind = "object" if route.media == "application/json" else "string"
    answer = {"type": kind} if route.answer is None else _reference(route.answer)
    found: Schema = {
        str(route.status): {
            "description": "Done." if route.method in WRITING else "What was asked for.",
            "content": {route.media: {"schema": answer}},
        }
    }
    by_status: dict[int, list[str]] = {}
    for code in sorted(codes_of(route)):
        for status in PROBLEMS[code].statuses:
            by_status.setdefault(status, []).append(code)
    for status, codes in sorted(by_status.items()):
        found[str(status)] = _refusal(codes)
    return found


def _refusal(codes: list[str]) -> Schema:
    schema = {
        "allOf": [
            {"$ref": REFERENCE.format(model="Problem")},
            {"properties": {"code": {"enum": codes}}},
        ]
    }
    described = "; ".join(f"`{code}`: {PROBLEMS[code].meaning}" for code in codes)
    return {"description": described, "content": {PROBLEM_TYPE: {"schema": schema}}}
