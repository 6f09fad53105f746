"""The steps that the pay-and-retry story is told in, and the request that it is about.

A story is a generator of steps; `drive` carries each out and sends its result back in. Five kinds
reach outside: `Send` and `Control` to the provider (`Read` completes an answer of it, and `After`
goes on once the caller has read one), `Ask` to the escrow, `Sleep`, and `Wait` for a condition of
the wallet, with which single-flight sections and the probe gate are built as well.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from x402mw.core.errors import LocalError
from x402mw_client.memory import Busy
from x402mw_client.operations import Operation
from x402mw_client.sessions import Subject

PATIENCE_SECONDS = 30.0
BUSY_SECONDS = 60.0
BUSY_PAUSE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Send:
    """Send the caller's request, with a payment header or without; the result is the answer."""

    signature: str | None


@dataclass(frozen=True, slots=True)
class Control:
    """POST to a provider's control path; the result is the answer with its body read."""

    url: str
    body: bytes
    signature: str


@dataclass(frozen=True, slots=True)
class Read:
    """Read the (short) body of an answer."""

    answer: httpx.Response


@dataclass(frozen=True, slots=True)
class Take:
    """Take in the whole body of a (short) answer; the caller is given it as it came."""

    answer: httpx.Response


@dataclass(frozen=True, slots=True)
class Discard:
    """Be done with an answer, so that its connection can be used again (`drive.tidy`)."""

    answer: httpx.Response


@dataclass(frozen=True, slots=True)
class After:
    """Tell another story once the caller is done with the body of an answer, and not before."""

    answer: httpx.Response
    story: "Story[None]"


@dataclass(frozen=True, slots=True)
class Together:
    """Tell several stories at once; they send nothing of the caller's."""

    stories: "list[Story[None]]"


@dataclass(frozen=True, slots=True)
class Ask:
    """Carry out an operation at the escrow."""

    operation: Operation[Any]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let time pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until `condition` returns something; the result is that, or None when time is up."""

    condition: Callable[[], Any]
    seconds: float


Step = Send | Control | Read | Take | Discard | After | Together | Ask | Sleep | Wait
T = TypeVar("T")
Story = Generator[Step, Any, T]


def patiently(change: Callable[[], T]) -> Story[T]:
    """Changes the wallet's books, as soon as other processes let go of its file."""
    for _ in range(int(BUSY_SECONDS / BUSY_PAUSE_SECONDS)):
        try:
            return change()
        except Busy:
            yield Sleep(BUSY_PAUSE_SECONDS)
    raise LocalError("another process is stuck while it changes the wallet file")


@dataclass(eq=False)
class Outgoing:
    """The caller's request, as the story sees it.

    `content` is its body if that can be sent again; else `stream` is the body, for one sending.
    """

    request: httpx.Request
    origin: str
    content: bytes | None
    stream: AsyncIterator[bytes] | Iterator[bytes] | None = None

    def __post_init__(self) -> None:
        url, origin = self.request.url, self.origin
        self.method = self.request.method
        self.path = url.path
        target = url.raw_path.decode("ascii").removesuffix("?")
        body_hash = None if self.content is None else hashlib.sha256(self.content).digest()
        self.subject = Subject(self.method, origin, target, body_hash, origin + self.path)

    @property
    def replayable(self) -> bool:
        """Whether the request can be sent more than once."""
        return self.content is not None

    @property
    def patience(self) -> float:
        """How long (seconds) the caller would wait for an answer to begin."""
        given = self.request.extensions.get("timeout", {}).get("read")
        return PATIENCE_SECONDS if given is None else float(given)


def origin_of(url: httpx.URL) -> str:
    """`scheme://host[:port]`, lower case, IDNA, without a default port."""
    return f"{url.scheme}://{url.netloc.decode('ascii').lower()}"
