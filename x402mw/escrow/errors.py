"""How the escrow refuses: one exception that is also one problem document (RFC 9457)."""

from typing import Any

from x402mw.core.errors import X402mwError
from x402mw.escrow.problems import PROBLEMS

PROBLEM = "urn:x402mw:problem:"


class Refused(X402mwError):
    """The escrow refuses a request and has changed nothing.

    `code` is one of `PROBLEMS`, which says what to do now; `detail` is for people and never repeats
    what others own or what an exception said.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        """`members` are further machine-readable fields of the problem document."""
        super().__init__(detail)
        self.status = status
        self.reason = code
        self.detail = detail
        self.headers = headers or {}
        self.members = members

    def problem(self) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "type": PROBLEM + self.reason,
            "code": self.reason,
            "title": self.reason.replace("_", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            "advice": PROBLEMS[self.reason].advice,
            **self.members,
        }


def not_found() -> Refused:
    """What does not exist and what belongs to others look the same."""
    return Refused(404, "not_found", "there is nothing here that you may see")
