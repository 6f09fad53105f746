"""What the query of a list may hold. Unknown and repeated parameters are refused, as in bodies."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request

from x402mw.core.amounts import AMOUNT_MAX
from x402mw.escrow import web
from x402mw.escrow.bodies import AgentId, JournalId
from x402mw.escrow.errors import Refused
from x402mw.escrow.redemption import CHANGES_MAX
from x402mw.escrow.words import Status

PAGE_ITEMS = 100
PAGE_ITEMS_MAX = 500


def _number(text: Any) -> Any:
    """Digits only: what `int` reads beside them is not what anybody meant."""
    if isinstance(text, str) and not web.NUMBER.fullmatch(text):
        raise ValueError("a whole number without sign or leading zeros")
    return text


Number = Annotated[int, Field(ge=0, le=AMOUNT_MAX), BeforeValidator(_number)]
Limit = Annotated[
    int,
    Field(ge=1, le=PAGE_ITEMS_MAX, description="The most items of a page."),
    BeforeValidator(_number),
]
Cursor = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,14})\.esc_[0-9a-f]{32}$")]
EventId = Annotated[str, Field(pattern=r"^[0-9]{1,17}(\.[0-9]{1,17})?$")]
_NEXT = Field(default=None, description="The `next` of the page before.")


class Query(BaseModel):
    """The parameters of a query; itself none at all."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Page(Query):
    """A page, newest first."""

    limit: Limit = PAGE_ITEMS
    after: Number | None = _NEXT


class EscrowPage(Page):
    """`GET /escrow`."""

    agent_id: AgentId | None = Field(default=None, description="Yourself; nobody else's are shown.")
    role: Literal["buyer", "provider"] | None = None
    status: Status | None = None


class CasePage(Query):
    """`GET /escrow/{id}/disputes`: each may hold a hundred statements, so few at a time."""

    limit: Annotated[
        int,
        Field(ge=1, le=10, description="The most items of a page."),
        BeforeValidator(_number),
    ] = 10
    after: Number | None = _NEXT


class TransferPage(Page):
    """`GET /transfers`."""

    role: Literal["sender", "recipient"] | None = None


class TenantEscrowPage(Page):
    """`GET /admin/escrow`."""

    agent_id: AgentId


class AgentPage(Query):
    """`GET /admin/agents`: by id."""

    limit: Limit = PAGE_ITEMS
    after: AgentId | None = _NEXT


class DisputePage(Query):
    """`GET /disputes`: oldest first."""

    limit: Limit = PAGE_ITEMS
    after: Cursor | None = _NEXT


class DeliveryPage(Query):
    """`GET /webhooks/{id}/deliveries`: newest event first."""

    limit: Limit = PAGE_ITEMS
    after: EventId | None = _NEXT


class Changes(Query):
    """`GET /changes`."""

    journal: JournalId
    since: Annotated[Number, Field(description="The `next` of the answer before.")] = 0
    serial: Annotated[Number, Field(description="The journal's own write counter.")] = 0
    limit: Annotated[
        int,
        Field(ge=1, le=CHANGES_MAX, description="The most changes of an answer."),
        BeforeValidator(_number),
    ] = PAGE_ITEMS


_NONE = Query()


def read_query(request: Request, model: type[Query]) -> Query:
    """Reads the query of a request, or refuses it."""
    # Nearly every request is this one.
    if model is Query and not request.scope["query_string"]:
        return _NONE
    given: dict[str, str] = {}
    for name, text in request.query_params.multi_items():
        if name in given:
            name = name[: web.FIELD_CHARACTERS_MAX]
            raise Refused(422, "invalid_request", f"{name}: given more than once")
        given[name] = text
    return web.parse(model, given)
