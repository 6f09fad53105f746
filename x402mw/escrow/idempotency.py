"""Idempotency keys: the stored answer of an operation commits together with what it moved.

`docs/money.md` 8. Refusals that depended on state are stored like any answer, so a key that was
refused can never succeed later. An answer that holds a secret is stored sealed, a long one packed.
"""

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

from nacl.encoding import URLSafeBase64Encoder
from nacl.secret import SecretBox
from sqlalchemy import bindparam, delete, select

from x402mw.escrow import schema
from x402mw.escrow.errors import Refused
from x402mw.escrow.keys import Signer
from x402mw.escrow.rules.outage import UP_GRACE_SECONDS
from x402mw.escrow.transactions import Transaction

KEY_CHARACTERS_MAX = 255
KEPT_SECONDS = 7 * 24 * 60 * 60
RETRY_AFTER_SECONDS = 1
_SEALED, _PACKED = "sealed:", "packed:"
"""What a sealed or packed answer begins with; others are JSON objects."""

_PACKED_FROM = 2000
"""Shorter answers are not worth the time. A few bytes may ask for a long one again and again."""

_KEPT = schema.idempotency.c
# Made once: to build a statement costs more than to run it.
_ONE = select(schema.idempotency).where(
    _KEPT.principal == bindparam("principal"),
    _KEPT.route == bindparam("route"),
    _KEPT.key == bindparam("key"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """One use of an `Idempotency-Key`: scoped to a principal and a route, bound to a body.

    `secret` says that its answer is nobody else's to read.
    """

    principal: str
    route: str
    key: str
    body_hash: str
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with; `replayed` if it was stored before."""

    status: int
    body: str
    replayed: bool = False


def hash_body(value: Any) -> str:
    """Hashes parsed JSON, so that spelling the same request differently is the same request."""
    text = json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def running() -> Refused:
    """The same key is being worked on right now."""
    return Refused(
        409,
        "idempotency_running",
        "a request with this key is still running",
        headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
    )


async def find(tx: Transaction, key: Key) -> Answer | None:
    """Returns the stored answer, or refuses a key that was used for another body."""
    values = {"principal": key.principal, "route": key.route, "key": key.key}
    row = (await tx.connection.execute(_ONE, values)).one_or_none()
    if row is None:
        return None
    if row.body_hash != key.body_hash:
        raise Refused(422, "idempotency_mismatch", "this key was used for a different request")
    return Answer(row.status, _unpack(_open(tx.signer, key, row.answer)), replayed=True)


async def store(tx: Transaction, key: Key, answer: Answer) -> None:
    """Keeps an answer for as long as anyone could retry."""
    text = _pack(answer.body)
    await tx.insert(
        schema.idempotency,
        {
            "principal": key.principal,
            "route": key.route,
            "key": key.key,
            "body_hash": key.body_hash,
            "status": answer.status,
            "answer": _seal(tx.signer, key, text) if key.secret else text,
            "created_at": tx.now,
        },
    )


def _pack(text: str) -> str:
    if len(text) < _PACKED_FROM:
        return text
    return _PACKED + base64.b64encode(zlib.compress(text.encode(), 1)).decode()


def _unpack(text: str) -> str:
    if not text.startswith(_PACKED):
        return text
    return zlib.decompress(base64.b64decode(text.removeprefix(_PACKED))).decode()


def _seal(signer: Signer, key: Key, text: str) -> str:
    return _SEALED + _box(signer, key).encrypt(text.encode(), encoder=URLSafeBase64Encoder).decode()


def _open(signer: Signer, key: Key, text: str) -> str:
    if not text.startswith(_SEALED):
        return text
    sealed = text.removeprefix(_SEALED).encode()
    return _box(signer, key).decrypt(sealed, encoder=URLSafeBase64Encoder).decode()


def _box(signer: Signer, key: Key) -> SecretBox:
    # Under another principal, path or key it does not open.
    return signer.answer_box(json.dumps([key.principal, key.route, key.key]))


async def prune(tx: Transaction) -> None:
    """Forgets answers that nobody asks for any more.

    Not soon after an outage or a jump of the clock, which may be wrong: a forgotten key pays again.
    """
    if tx.now < tx.service.up_since + UP_GRACE_SECONDS:
        return
    table = schema.idempotency
    await tx.connection.execute(delete(table).where(table.c.created_at < tx.now - KEPT_SECONDS))
