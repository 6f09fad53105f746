"""Prices beside their handlers: `@priced("0.001")` and `@free`, found by the middleware at start.

    @priced(PerUnit("token", "0.002", per=1000, max_units=4000))
    async def summarize(request): ...

1. A mark says the same as a line of the price list, and is checked like one. It stands in the
   handler's own attributes, so `functools.wraps` keeps it and the order of decorators is free.
2. A marked handler runs only within a paid call. Where no middleware stands in front, or something
   hides the mark from it, the handler fails instead of being free.
"""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from x402mw.core.errors import ConfigurationError
from x402mw.core.pricing import FREE, Free, PerCall, Plan
from x402mw.provider.prices import Priced

Handler = TypeVar("Handler", bound=Callable[..., Any])
Entry = Plan | Priced | Free


@dataclass(slots=True)
class Paying:
    """One paid call, for as long as it `lasts`: a task that outlives it learns of its end."""

    lasts: bool = True


PAYING: ContextVar[Paying | None] = ContextVar("x402mw_paying", default=None)
"""The paid call within which the code runs now, if it does; set by the middleware."""
HTTP_METHODS = ("get", "head", "post", "put", "patch", "delete", "options")
_MARK = "__x402mw_price__"
_GUARDED = "__x402mw_guarded__"
_DEPTH_MAX = 4


def priced(price: str | Plan | Priced) -> Callable[[Handler], Handler]:
    """Prices a handler: a function, an `HTTPEndpoint` class, or one method of such a class.

    A bare text is a price per call. Raises `ConfigurationError` for what is no price, and for a
    handler that has one already.
    """
    entry = PerCall(price) if isinstance(price, str) else price
    if not isinstance(entry, Plan | Priced):
        raise ConfigurationError(f'a handler is priced like @priced("0.001"), not {price!r}')

    def mark(handler: Handler) -> Handler:
        _mark(handler, entry)
        guarded: Handler = _guard_class(handler) if inspect.isclass(handler) else _guard(handler)
        return guarded

    return mark


def free(handler: Handler) -> Handler:
    """Marks a handler that costs nothing although others of its path do."""
    _mark(handler, FREE)
    if inspect.isclass(handler):
        # It may be the heir of a priced one.
        _unguard_methods(handler)
    return handler


def _mark(handler: Any, entry: Entry) -> None:
    if _MARK in getattr(handler, "__dict__", {}):
        raise ConfigurationError(f"{_name(handler)} is priced twice")
    try:
        setattr(handler, _MARK, entry)
    except AttributeError:
        raise ConfigurationError(f"{_name(handler)} cannot be priced: it is no handler") from None


def _name(handler: Any) -> str:
    return str(getattr(handler, "__qualname__", None) or repr(handler))


# What the middleware looks for.


def find_price(endpoint: Any, method: str) -> Entry | None:
    """Returns the mark of a route's endpoint, for one of its methods; None if it has none.

    Raises `ConfigurationError` if the mark cannot be seen but something priced is inside.
    """
    if inspect.isclass(endpoint):
        handler = _class_handler(endpoint, method)
        found = _mark_of(handler) or _mark_of(endpoint)
        if found is None and any(_mark_of(_class_handler(of, method)) for of in endpoint.__mro__):
            raise ConfigurationError(
                f"{_name(handler)} takes the place of a priced method: give it @priced, or @free"
            )
        return found
    found = _mark_of(endpoint)
    if found is None and _hides_price(endpoint, _DEPTH_MAX):
        raise ConfigurationError(
            f"the price inside {_name(endpoint)} is hidden by another decorator: "
            "let that use functools.wraps, or put @priced above it"
        )
    return found


def class_methods(endpoint: Any) -> list[str]:
    """The HTTP methods that an `HTTPEndpoint` class takes; none for anything else."""
    if not inspect.isclass(endpoint):
        return []
    return [name.upper() for name in HTTP_METHODS if callable(getattr(endpoint, name, None))]


def _class_handler(endpoint: type, method: str) -> Any:
    own = getattr(endpoint, method.lower(), None)
    return endpoint.get if own is None and method == "HEAD" and hasattr(endpoint, "get") else own


def _mark_of(handler: Any) -> Entry | None:
    for _ in range(_DEPTH_MAX):
        entry = getattr(handler, _MARK, None)
        if entry is not None or handler is None:
            return entry
        inner = handler.func if isinstance(handler, functools.partial) else None
        handler = inner or getattr(handler, "__wrapped__", None)
    return None


def _hides_price(handler: Any, depth: int) -> bool:
    """Whether a function holds a priced one in its closure, where a decorator keeps it."""
    for cell in getattr(handler, "__closure__", None) or ():
        try:
            inner = cell.cell_contents
        except ValueError:
            continue
        if not callable(inner) or inspect.isclass(inner):
            continue
        if _mark_of(inner) not in (None, FREE) or (depth and _hides_price(inner, depth - 1)):
            return True
    return False


# What runs in place of the handler.


def _guard_class(endpoint: Any) -> Any:
    """Guards every method of an `HTTPEndpoint` that has no mark of its own, and of its heirs."""
    if not class_methods(endpoint):
        raise ConfigurationError(f"{_name(endpoint)} is no HTTPEndpoint, and cannot be priced")
    _guard_methods(endpoint)
    own = vars(endpoint).get("__init_subclass__")

    def guard_heir(heir: type, /, **named: Any) -> None:
        if own is None:
            super(endpoint, heir).__init_subclass__(**named)
        else:
            own.__func__(heir, **named)
        # The price is inherited, so what an heir does instead is sold as well.
        _guard_methods(heir)

    endpoint.__init_subclass__ = classmethod(guard_heir)
    return endpoint


def _guard_methods(endpoint: type) -> None:
    for name in map(str.lower, class_methods(endpoint)):
        handler = getattr(endpoint, name)
        if _mark_of(handler) is None and not hasattr(handler, _GUARDED):
            guarded = _guard(handler)
            setattr(guarded, _GUARDED, True)
            setattr(endpoint, name, guarded)


def _unguard_methods(endpoint: type) -> None:
    for name in map(str.lower, class_methods(endpoint)):
        handler = getattr(endpoint, name)
        if hasattr(handler, _GUARDED):
            setattr(endpoint, name, handler.__wrapped__)


def _guard(handler: Any) -> Any:
    """Wraps a handler so that it runs within a paid call only, whichever kind it is."""
    if inspect.isasyncgenfunction(handler):

        async def guarded_parts(*given: Any, **named: Any) -> AsyncIterator[Any]:
            _check_paying(handler)
            async with aclosing(handler(*given, **named)) as parts:
                async for part in parts:
                    yield part

        return functools.wraps(handler)(guarded_parts)
    if inspect.isgeneratorfunction(handler):

        def guarded_items(*given: Any, **named: Any) -> Iterator[Any]:
            _check_paying(handler)
            yield from handler(*given, **named)

        return functools.wraps(handler)(guarded_items)
    if inspect.iscoroutinefunction(handler):

        async def guarded(*given: Any, **named: Any) -> Any:
            _check_paying(handler)
            return await handler(*given, **named)

        return functools.wraps(handler)(guarded)

    def guarded_plain(*given: Any, **named: Any) -> Any:
        _check_paying(handler)
        return handler(*given, **named)

    return functools.wraps(handler)(guarded_plain)


def _check_paying(handler: Any) -> None:
    paying = PAYING.get()
    if paying is None or not paying.lasts:
        raise ConfigurationError(
            f"{_name(handler)} has a price but was called outside of a paid request: "
            "put PaymentMiddleware in front of its app"
        )
