"""Holds answers against the route table, which is what the OpenAPI document says of them."""

import re
from functools import cache
from typing import Any

import httpx
from pydantic import TypeAdapter

from x402mw.escrow.api import service
from x402mw.escrow.api.dialects import BASES
from x402mw.escrow.api.openapi import codes_of
from x402mw.escrow.api.routes import Route
from x402mw.escrow.app import ROUTES
from x402mw.escrow.problems import PROBLEMS

CANONICAL = BASES[0]


@cache
def _table() -> list[tuple[re.Pattern[str], Route]]:
    tables = [("", service.ROUTES), *((base, ROUTES) for base in BASES)]
    return [
        (re.compile(re.sub(r"\{\w+\}", "[^/]+", base + route.path)), route)
        for base, routes in tables
        for route in routes
    ]


@cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def find_route(method: str, path: str) -> Route | None:
    """The route of a request, or None if there is none."""
    method = "GET" if method == "HEAD" else method
    for pattern, route in _table():
        if pattern.fullmatch(path) and route.method == method:
            return route
    return None


async def conforms(answer: httpx.Response) -> None:
    """Fails unless the answer is one that the table promises."""
    request = answer.request
    # Half of the strange requests never reach a route.
    path = request.url.raw_path.partition(b"?")[0].decode()
    route = find_route(request.method, path)
    if route is None or answer.headers.get("content-type", "").startswith("text/"):
        return
    # A stored answer may be older than the table.
    if "idempotent-replayed" in answer.headers:
        return
    await answer.aread()
    where = f"{request.method} {route.path}: {answer.status_code} {answer.text[:300]}"
    if answer.status_code >= 400:
        check_problem(route, answer, where)
        return
    assert answer.status_code == route.status, where
    # Under the other base escrows have more names.
    if route.answer is not None and request.method != "HEAD" and path.startswith(CANONICAL):
        _reader(route.answer).validate_json(answer.content)


def check_problem(route: Route, answer: httpx.Response, where: str) -> None:
    """Fails unless this route may be refused so."""
    if answer.request.method != "HEAD":
        code = answer.json()["code"]
        assert code in codes_of(route), where
        assert answer.status_code in PROBLEMS[code].statuses, where
