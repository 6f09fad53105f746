"""What request bodies may hold: strict models that turn strangers' JSON into values.

Amounts arrive as display strings and leave as atomic integers; ids and keys stay text, once it is
certain that they are well formed. Unknown members are refused: a misspelt one must not be ignored.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
)

from x402mw.core import ids
from x402mw.core.amounts import (
    AMOUNT_MAX,
    DISPLAY_CHARACTERS_MAX,
    USDC,
    Atomic,
    to_atomic,
    to_atomic_floor,
)
from x402mw.core.errors import X402mwError
from x402mw.core.keys import PUBLIC_KEY_BYTES, check_public_key
from x402mw.core.strict import b64url_decode

NAME_CHARACTERS_MAX = 100
MEMO_CHARACTERS_MAX = 500
EXPIRES_SECONDS_MIN = 30 * 60
EXPIRES_SECONDS_DEFAULT = 24 * 60 * 60
EXPIRES_SECONDS_MAX = 365 * 24 * 60 * 60
REDEEM_ITEMS_MAX = 1000
HANDLE_FORM = "[a-z0-9-]{3,40}"
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols, by their class, that show nothing."""

_CODE = re.compile(rf"ag_[0-9a-f]{{32}}|{HANDLE_FORM}", re.ASCII)
_PLAIN_TOTAL = re.compile(rf"([0-9]{{1,12}})\.([0-9]{{1,{USDC.decimals}}})", re.ASCII)


def checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A validator out of a function that raises our own errors."""

    def run(value: Any) -> Any:
        try:
            return check(value)
        except X402mwError as error:
            raise ValueError(str(error)) from None

    return run


def positive(amount: Any) -> Any:
    """Refuses an amount of 0, whole units or finer ones."""
    if amount == 0:
        raise ValueError("an amount of 0 moves nothing")
    return amount


def printable(text: str) -> str:
    """Refuses control characters in a text."""
    # Control characters forge log lines, and a database may refuse NUL with an error of its own.
    if not text.isprintable():
        raise ValueError("only printable characters belong here")
    return text


def visible(text: str) -> str:
    """Refuses a text of blanks and marks only: a name that nobody can see names nothing."""
    for character in text:
        if unicodedata.category(character)[0] not in "ZCM" and character not in _BLANKS:
            return text
    raise ValueError("something to see belongs here")


def read_total(text: object) -> Atomic:
    """`to_atomic_floor`, with a short way for what providers write a thousand times in a batch."""
    plain = _PLAIN_TOTAL.fullmatch(text) if isinstance(text, str) else None
    if plain is None:
        return to_atomic_floor(text)
    return Atomic(int(plain[1] + plain[2].ljust(USDC.decimals, "0")))


def _key(text: str) -> str:
    check_public_key(b64url_decode(text, PUBLIC_KEY_BYTES))
    return text


def _code(text: str) -> str:
    if not _CODE.fullmatch(text):
        raise ValueError("a referral code is an agent's id or handle")
    return text


def _id(prefix: str) -> AfterValidator:
    return AfterValidator(checked(lambda text: ids.format_id(prefix, ids.parse_id(prefix, text))))


def text_form(pattern: str, example: str, description: str = "") -> WithJsonSchema:
    """How a text is described whose form a function checks."""
    form = {"type": "string", "pattern": f"^{pattern}$", "examples": [example]}
    return WithJsonSchema({**form, "description": description} if description else form)


def _id_form(prefix: str, digit: str) -> WithJsonSchema:
    return text_form(f"{prefix}[0-9a-f]{{32}}", prefix + digit * 32)


AMOUNT_FORM = {
    "type": "string",
    "maxLength": DISPLAY_CHARACTERS_MAX,
    "pattern": r"^\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$",
    "examples": ["10.00"],
    "description": "Display units, as a decimal string.",
}


Amount = Annotated[Atomic, BeforeValidator(checked(to_atomic)), WithJsonSchema(AMOUNT_FORM)]
PositiveAmount = Annotated[Amount, AfterValidator(positive)]
Total = Annotated[Atomic, BeforeValidator(checked(read_total)), WithJsonSchema(AMOUNT_FORM)]
ReferralCode = Annotated[
    str,
    AfterValidator(_code),
    text_form(f"({_CODE.pattern})", "some-bot", "The id or the handle of the agent that referred."),
]
PublicKey = Annotated[
    str,
    AfterValidator(checked(_key)),
    text_form(
        "[A-Za-z0-9_-]{43}",
        "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
        "An Ed25519 public key, base64url.",
    ),
]
AgentId = Annotated[str, _id(ids.AGENT), _id_form(ids.AGENT, "a")]
EscrowId = Annotated[str, _id(ids.ESCROW), _id_form(ids.ESCROW, "e")]
JournalId = Annotated[str, _id(ids.JOURNAL), _id_form(ids.JOURNAL, "1")]
Name = Annotated[
    str,
    Field(min_length=1, max_length=NAME_CHARACTERS_MAX),
    AfterValidator(printable),
    AfterValidator(visible),
]
Memo = Annotated[str, Field(max_length=MEMO_CHARACTERS_MAX), AfterValidator(printable)]
Serial = Annotated[int, Field(ge=0, le=AMOUNT_MAX)]


class Body(BaseModel):
    """A request body; itself the empty one."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class NewJournal(Body):
    """`PUT /journals/{id}`."""

    receipt_key: PublicKey


class NewEscrow(Body):
    """`POST /escrow`: a session."""

    to_agent_id: AgentId
    amount: PositiveAmount
    session_key: PublicKey
    journal: JournalId
    expires_in_seconds: Annotated[int, Field(ge=EXPIRES_SECONDS_MIN, le=EXPIRES_SECONDS_MAX)] = (
        EXPIRES_SECONDS_DEFAULT
    )
    memo: Memo = ""
    referral_code: ReferralCode | None = None
    low_balance: Amount | None = None


class RedemptionItem(Body):
    """One voucher with the total y to redeem, or the close of a session without a voucher."""

    voucher: Annotated[str, Field(max_length=1024)] | None = None
    escrow_id: EscrowId | None = None
    amount: Total
    final: bool = False


class Redemption(Body):
    """`POST /redeem`. `serial` is the journal's own write counter."""

    journal: JournalId
    serial: Serial
    items: Annotated[list[RedemptionItem], Field(max_length=REDEEM_ITEMS_MAX)]


class Close(Body):
    """`POST /escrow/{id}/close`: a provider may bring the last voucher and total."""

    voucher: Annotated[str, Field(max_length=1024)] | None = None
    amount: Total | None = None
