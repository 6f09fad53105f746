"""A provider with many open sessions, and the batches of vouchers that it redeems."""

import secrets
from dataclasses import dataclass

from tests.support.escrow import RECEIPT_KEY, SESSION_KEY, SESSION_SEED
from x402mw.core import ids
from x402mw.core.amounts import Atomic, display, to_atomic
from x402mw.core.keys import secret_key
from x402mw.core.vouchers import Voucher, network_id, sign_voucher
from x402mw.escrow import agents, bodies, redemption
from x402mw.escrow.ledger import Ledger
from x402mw.escrow.rules import session

JOURNAL = "jr_" + "2" * 32
DEPOSIT = to_atomic("100.00")


@dataclass
class Crowd:
    """Many sessions of one buyer at one provider. Amounts are atomic units."""

    buyer: str
    provider: str
    api_key: str
    network: bytes
    sessions: list[str]

    def vouchers(self, total: int) -> list[dict[str, str]]:
        """A batch as it is sent: every session once, with a fresh voucher for a total."""
        secret = secret_key(SESSION_SEED)
        return [
            {"voucher": sign_voucher(self._voucher(name, total), secret).wire, "amount": text}
            for name, text in zip(self.sessions, [display(total)] * len(self.sessions), strict=True)
        ]

    def _voucher(self, name: str, total: int) -> Voucher:
        session = ids.parse_id(ids.ESCROW, name)
        return Voucher(self.network, session, secrets.randbits(63), Atomic(total), bytes(32))

    def body(self, total: int) -> dict[str, object]:
        """The body of `POST /redeem` for a total."""
        return {"journal": JOURNAL, "serial": total, "items": self.vouchers(total)}

    def parsed(self, total: int) -> bodies.Redemption:
        """The same, read."""
        return bodies.Redemption.model_validate(self.body(total))

    async def redeem(self, ledger: Ledger, batch: bodies.Redemption) -> str:
        """Redeems a batch through the ledger, and returns the answer's text."""
        judged = await redemption.judge(ledger.read, self.provider, batch.items, self.network)
        answer = await ledger.perform(
            lambda tx: redemption.redeem(tx, self.provider, batch, judged), caller=self.provider
        )
        assert answer.status == 200, answer.body
        return answer.body


async def open_crowd(ledger: Ledger, sessions: int, seconds: int = 86_400) -> Crowd:
    """Opens sessions of $100, that end after so many seconds, in one transaction."""
    async with ledger.write() as tx:
        buyer = (await agents.register(tx, "buyer"))["agent_id"]
        provider = await agents.register(tx, "provider")
        await agents.register_journal(tx, provider["agent_id"], JOURNAL, RECEIPT_KEY)
        await agents.deposit(tx, buyer, Atomic(sessions * DEPOSIT))
        names = []
        for _ in range(sessions):
            empty = session.new_session(
                escrow_id=ids.format_id(ids.ESCROW, secrets.token_bytes(ids.ID_BYTES)),
                buyer=buyer,
                provider=provider["agent_id"],
                asset=ledger.settings.asset.code,
                fee_bps=ledger.settings.fee_bps,
                session_key=SESSION_KEY,
                journal=JOURNAL,
                memo="",
                created_at=tx.now,
                expires_at=tx.now + seconds,
            )
            names.append(tx.lock(empty, session.top_up(empty, DEPOSIT)).escrow_id)
    network = network_id(ledger.settings.network, ledger.signer.root_key)
    return Crowd(buyer, provider["agent_id"], provider["api_key"], network, names)
