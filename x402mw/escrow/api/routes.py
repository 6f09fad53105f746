"""The route table's form: all that the service and its OpenAPI document know about an operation."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from starlette import routing
from starlette.requests import Request
from starlette.responses import Response

from x402mw.escrow.api.queries import Query

Endpoint = Callable[[Request], Awaitable[Response]]

OPEN = ""
"""The scopes of a route that needs no key."""


class Route(NamedTuple):
    """One operation.

    Of the `scopes`, separated by spaces, a key needs one, and besides that all of `also`. `body`
    and `answer` are pydantic models, or unions of them; no body is the empty object. `refusals`
    names the codes, separated by spaces, that are this route's own: those that follow from its
    other fields are not repeated. `keyed` tells whether it looks at an Idempotency-Key. Without an
    `answer` it is a text of type `media`.
    """

    method: str
    path: str
    scopes: str
    endpoint: Endpoint
    summary: str
    answer: Any
    body: Any = None
    query: type[Query] = Query
    status: int = 200
    refusals: str = ""
    keyed: bool = True
    media: str = "application/json"
    also: str = ""


Routes = tuple[Route, ...]


def mount(
    base: str, routes: Iterable[Route], guard: Callable[[Route], Endpoint]
) -> list[routing.Route]:
    """What the router needs: one entry for each path, so that `Allow` names all its methods."""
    paths: dict[str, dict[str, Endpoint]] = {}
    for route in routes:
        paths.setdefault(base + route.path, {})[route.method] = guard(route)
    return [
        routing.Route(path, _choose(methods), methods=list(methods))
        for path, methods in paths.items()
    ]


def _choose(methods: dict[str, Endpoint]) -> Endpoint:
    if len(methods) == 1:
        return next(iter(methods.values()))

    async def chosen(request: Request) -> Response:
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        # Logs and figures name what ran, not this.
        request.scope["endpoint"] = endpoint
        return await endpoint(request)

    return chosen
