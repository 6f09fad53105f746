"""The escrow's keys: one root that signs only the key set, and signing keys that sign tokens.

The root seed is a file of mode 0600 beside the database, or an environment variable; it is never
in the database. Signing seeds are derived from it and a number, so the database holds public keys
only and a stolen copy of it signs nothing. `docs/escrow.md`, Keys.
"""

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from nacl.secret import SecretBox
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from x402mw.core.checkpoints import Checkpoint, sign_checkpoint, sign_key_proof
from x402mw.core.errors import ConfigurationError, Malformed
from x402mw.core.keys import SEED_BYTES, public_key
from x402mw.core.signed import key_id
from x402mw.core.strict import b64url_decode, b64url_encode
from x402mw.core.tokens import (
    TOKEN_SECONDS,
    KeySet,
    SessionToken,
    sign_key_set,
    sign_session_token,
)
from x402mw.escrow import schema
from x402mw.escrow.settings import Settings

KEY_SET_SECONDS = 24 * 60 * 60
RETENTION_SECONDS = 7 * 24 * 60 * 60
"""How long a retired key stays in the set after the last voucher under it was redeemable."""

KEYS_MAX = 32
WEBHOOK_SECRET = "whsec_"  # noqa: S105 (what secrets begin with)
_PERSON, _WEBHOOK_PERSON = b"x402mw/signing", b"x402mw/webhook"
_ANSWER_PERSON = b"x402mw/answer"


def load_root_seed(path: Path | None, text: str | None, *, may_create: bool) -> bytes:
    """Returns the root seed from a text (base64url) if given, else from its file.

    Makes the file only if `may_create`. Raises `ConfigurationError` when there is no seed, when it
    is malformed, or when others can read the file.
    """
    if text is not None:
        return _parse_seed(text)
    if path is None:
        raise ConfigurationError("a database server needs the root key in X402MW_ROOT_KEY")
    try:
        if may_create and not path.exists():
            return _create_seed(path)
        if not path.exists():
            # A new key would disown every open session.
            raise ConfigurationError(f"the root key {path} is missing: put it back")
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigurationError(f"others can read the root key {path}: chmod 600 it")
        return _parse_seed(path.read_text("ascii").strip())
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"the root key {path} cannot be read or made") from None


def _create_seed(path: Path) -> bytes:
    seed = secrets.token_bytes(SEED_BYTES)
    # Exclusive: of two processes that start at once, the second fails instead of overwriting.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(b64url_encode(seed) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return seed


def _parse_seed(text: str) -> bytes:
    try:
        return b64url_decode(text, SEED_BYTES)
    except Malformed as error:
        raise ConfigurationError(f"the root key is malformed: {error}") from None


@dataclass(slots=True)
class Signer:
    """Signs with the root and with the newest signing key, which it knows by the key serial."""

    settings: Settings
    serial: int = 0
    number: int = 0

    @property
    def root_key(self) -> bytes:
        """The public root key that everyone pins."""
        return public_key(self.settings.root_seed)

    def seed(self, number: int) -> bytes:
        """The seed of one signing key, derived from the root seed."""
        return hashlib.blake2b(
            number.to_bytes(8, "big"),
            key=self.settings.root_seed,
            person=_PERSON,
            digest_size=SEED_BYTES,
        ).digest()

    def webhook_secret(self, webhook_id: str, generation: int) -> str:
        """What signs the deliveries of a webhook; like signing seeds, it is nowhere stored."""
        text = generation.to_bytes(8, "big") + webhook_id.encode()
        derived = hashlib.blake2b(text, key=self.settings.root_seed, person=_WEBHOOK_PERSON)
        return WEBHOOK_SECRET + b64url_encode(derived.digest()[:SEED_BYTES])

    def answer_box(self, purpose: str) -> SecretBox:
        """Seals what the database may hold but not tell: each stored answer under its own key."""
        derived = hashlib.blake2b(
            purpose.encode(),
            key=self.settings.root_seed,
            person=_ANSWER_PERSON,
            digest_size=SecretBox.KEY_SIZE,
        )
        return SecretBox(derived.digest())

    async def refresh(self, connection: AsyncConnection, serial: int) -> None:
        """Learns of a rotation, which may have been another process's."""
        if serial == self.serial:
            return
        newest = select(schema.signing_keys.c.number).order_by(schema.signing_keys.c.number.desc())
        self.number = (await connection.execute(newest.limit(1))).scalar_one()
        self.serial = serial

    def sign_token(self, token: SessionToken) -> str:
        """Signs a session token with the newest signing key."""
        return sign_session_token(token, self.seed(self.number))

    def sign_checkpoint(self, seq: int, entry_hash: str, now: int) -> str:
        """Signs what the hash of the books is at their newest entry."""
        checkpoint = Checkpoint(self.settings.network, seq, entry_hash, now)
        return sign_checkpoint(checkpoint, self.seed(self.number))

    def _prove(self, number: int) -> str:
        public = public_key(self.seed(number))
        return sign_key_proof(self.settings.network, number, public, self.settings.root_seed)

    async def prove_keys(self, connection: AsyncConnection) -> None:
        """Vouches for signing keys that older versions made."""
        keys = schema.signing_keys
        numbers = await connection.execute(select(keys.c.number).where(keys.c.proof.is_(None)))
        for (number,) in numbers.all():
            vouched = update(keys).where(keys.c.number == number)
            await connection.execute(vouched.values(proof=self._prove(number)))

    async def add_key(self, connection: AsyncConnection, number: int, now: int) -> None:
        """Retires all keys and adds the next one; the caller raises the key serial with it."""
        keys = schema.signing_keys
        await connection.execute(
            update(keys).where(keys.c.retired_at.is_(None)).values(retired_at=now)
        )
        public = public_key(self.seed(number))
        await connection.execute(
            insert(keys).values(
                number=number,
                key_id=key_id(public),
                public_key=b64url_encode(public),
                proof=self._prove(number),
                created_at=now,
            )
        )

    async def key_set(self, connection: AsyncConnection, serial: int, now: int) -> str:
        """Signs the set of keys that are in use or were used not long ago."""
        keys = schema.signing_keys
        oldest = now - TOKEN_SECONDS - self.settings.claim_seconds - RETENTION_SECONDS
        rows = await connection.execute(
            select(keys)
            .where(keys.c.retired_at.is_(None) | (keys.c.retired_at > oldest))
            .order_by(keys.c.number.desc())
            .limit(KEYS_MAX)
        )
        found = rows.all()
        key_set = KeySet(
            network=self.settings.network,
            serial=serial,
            not_after=now + KEY_SET_SECONDS,
            keys={row.key_id: b64url_decode(row.public_key, 32) for row in found},
            retired=frozenset(row.key_id for row in found if row.retired_at is not None),
            min_escrow=self.settings.min_escrow,
            claim_seconds=self.settings.claim_seconds,
        )
        return sign_key_set(key_set, self.settings.root_seed)
