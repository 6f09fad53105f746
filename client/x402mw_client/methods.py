"""What makes operations, listings and steps the methods of both of the escrow's clients."""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from pydantic import BaseModel

from x402mw_client.operations import Listing, Operation, Steps

if TYPE_CHECKING:
    from x402mw_client.escrow import AsyncEscrowClient, EscrowClient

P = ParamSpec("P")
T = TypeVar("T", bound=BaseModel)
Made = TypeVar("Made")


class Method(Generic[P, T]):
    """Makes an operation a method of both clients: a coroutine there, a plain call here."""

    def __init__(self, build: Callable[P, Operation[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(
        self, escrow: "AsyncEscrowClient", owner: type
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, escrow: "EscrowClient", owner: type) -> Callable[P, T]: ...

    def __get__(self, escrow: "AsyncEscrowClient | EscrowClient", owner: type) -> Callable[P, Any]:
        return wraps(self._build)(lambda *given, **named: escrow.run(self._build(*given, **named)))


class Walk(Generic[P, T]):
    """Makes a listing a method of both clients: an async iterator there, a plain one here."""

    def __init__(self, build: Callable[P, Listing[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(
        self, escrow: "AsyncEscrowClient", owner: type
    ) -> Callable[P, AsyncIterator[T]]: ...
    @overload
    def __get__(self, escrow: "EscrowClient", owner: type) -> Callable[P, Iterator[T]]: ...

    def __get__(self, escrow: "AsyncEscrowClient | EscrowClient", owner: type) -> Callable[P, Any]:
        return wraps(self._build)(lambda *given, **named: escrow.walk(self._build(*given, **named)))


class Series(Generic[P, Made]):
    """Makes steps a method of both clients."""

    def __init__(self, build: Callable[P, Steps[Made]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(
        self, escrow: "AsyncEscrowClient", owner: type
    ) -> Callable[P, Coroutine[Any, Any, Made]]: ...
    @overload
    def __get__(self, escrow: "EscrowClient", owner: type) -> Callable[P, Made]: ...

    def __get__(self, escrow: "AsyncEscrowClient | EscrowClient", owner: type) -> Callable[P, Any]:
        return wraps(self._build)(
            lambda *given, **named: escrow.follow(self._build(*given, **named))
        )
