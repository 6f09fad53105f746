"""One tree of errors. Each knows whose fault it is, and whether money may have moved.

`LocalError` is our own caller's mistake, `RemoteError` the other party's answer. Every error has a
stable `code`, which is also what goes over the wire (RFC 9457 `type`), so a program decides by code
and a person reads the message.
"""

from enum import Enum
from typing import Any, ClassVar


class Moved(Enum):
    """Whether the payment behind an error may have been taken."""

    NO = "no"
    MAYBE = "maybe"
    YES = "yes"


class X402mwError(Exception):
    """The root of every error this project raises on purpose."""

    code: ClassVar[str] = "error"
    moved: ClassVar[Moved] = Moved.NO


class LocalError(X402mwError):
    """Our caller asked for something that cannot be done as asked."""

    code = "local_error"


class RemoteError(X402mwError):
    """The other party sent, or refused, something."""

    code = "remote_error"


# What is wrong with a value or a text.


class AmountInvalid(LocalError):
    """An amount that is no amount: wrong text, out of range, or finer than its asset."""

    code = "amount_invalid"


class ConfigurationError(LocalError):
    """A setting, price or route that could not work; found when starting, never later."""

    code = "configuration"


class Malformed(RemoteError):
    """Bytes from a stranger that do not have the one allowed form."""

    code = "malformed"


class KeyRefused(RemoteError):
    """A public key that is not a proper point of the curve."""

    code = "key_refused"


class TokenRefused(RemoteError):
    """A token, receipt or key set that is not what it claims to be."""

    code = "token"


class UnknownKey(TokenRefused):
    """A token signed by a key that is not in the key set we hold (a fresh set may have it)."""

    code = "unknown_key"


# What the provider's handler may do wrong.


class AlreadySettled(LocalError):
    """`charge(...)` came after the price of the call was settled."""

    code = "already_settled"


class WrongUnit(LocalError):
    """`charge(...)` named a unit that the price of this route does not have."""

    code = "wrong_unit"


# What a buyer's call may end in.


class LimitExceeded(LocalError):
    """The wallet's limits refused the call before anything was signed or locked."""

    code = "limit_exceeded"

    def __init__(self, limit: str, message: str) -> None:
        """`limit` names the limit that refused: one field of `Limits`, or "deposit"."""
        super().__init__(message)
        self.limit = limit


class BodyNotReplayable(LocalError):
    """A request body that cannot be sent twice, on a route that binds bodies; nothing was sent."""

    code = "body_not_replayable"


class InsecureOrigin(LocalError):
    """Payment over plain http to anything but this machine itself."""

    code = "insecure_origin"


class PaymentRefused(RemoteError):
    """The provider refused what we signed and will never charge for it."""

    code = "payment_refused"

    def __init__(self, message: str, *, reason: str = "") -> None:
        """`reason` is the provider's machine code, if it gave one."""
        super().__init__(message)
        self.reason = reason


class EscrowRefused(RemoteError):
    """The escrow refused an operation and changed nothing."""

    code = "escrow_refused"

    def __init__(
        self, message: str, *, reason: str, status: int, problem: dict[str, Any] | None = None
    ) -> None:
        """`reason` is the escrow's code, `problem` its whole problem document."""
        super().__init__(message)
        self.reason = reason
        self.status = status
        self.problem = problem or {}


class EscrowUnavailable(RemoteError):
    """The escrow could not be reached or did not answer in our language.

    Operations carry an idempotency key, so calling again can never move money twice.
    """

    code = "escrow_unavailable"
    moved = Moved.MAYBE


class AccountsDiffer(RemoteError):
    """The provider's account of a session is not ours: nothing more is signed for it."""

    code = "accounts_differ"
    moved = Moved.MAYBE


class PaymentOutcomeUnknown(RemoteError):
    """The answer was lost: the call may or may not have run and been charged.

    The amount stays counted against the limits. `handle` resumes the very same payment, which
    can never be charged a second time.
    """

    code = "payment_outcome_unknown"
    moved = Moved.MAYBE

    def __init__(self, message: str, *, handle: Any = None) -> None:
        """`handle` is the `PaymentHandle` that resumes this payment."""
        super().__init__(message)
        self.handle = handle


class PaidOutcomeGone(RemoteError):
    """The call ran and was charged, but the provider no longer keeps its answer."""

    code = "paid_outcome_gone"
    moved = Moved.YES

    def __init__(self, message: str, *, charge: int) -> None:
        """`charge` is what the provider says the call cost, in atomic units."""
        super().__init__(message)
        self.charge = charge
