"""The adapter to the buyer's wallet: the real one, on the simulated network.

Only this file knows how a wallet reaches its escrow and its file. The process may die right before
or right after the file is written.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from tests.simulation.journals import Disk
from tests.simulation.loop import HERE
from tests.simulation.network import Network, Wire
from x402mw_client.control import resolve_doubts as resolve_doubts
from x402mw_client.escrow import AsyncEscrowClient
from x402mw_client.limits import Limits
from x402mw_client.sessions import Session
from x402mw_client.transport import PaymentTransport
from x402mw_client.wallet import Wallet
from x402mw_client.walletfile import WalletFile

POLL_SECONDS = 0.5


class Ordered(dict[Any, None]):
    """A set that is gone through in order: sets of objects differ from run to run."""

    def add(self, item: Any) -> None:
        """Adds an item."""
        self[item] = None

    def discard(self, item: Any) -> None:
        """Takes an item out."""
        self.pop(item, None)


class SimWallet(Wallet):
    """A wallet whose escrow client uses the simulated network."""

    network: Network
    here: str

    def async_escrow(self) -> AsyncEscrowClient:
        """A client of the escrow's API."""
        return escrow_client(self.network, self.here, self.state.escrow, self._api_key)


def escrow_client(network: Network, here: str, url: str, api_key: str | None) -> AsyncEscrowClient:
    """A client of the escrow on the simulated network."""
    client = httpx.AsyncClient(transport=Wire(network, here), trust_env=False)
    return AsyncEscrowClient(url, api_key, client=client)


class Database:
    """The wallet's connection: its commits depend on the disk, and it ends with its process."""

    def __init__(self, connection: Any, disk: Disk) -> None:
        self._connection, self._disk, self._alive = connection, disk, True

    def execute(self, statement: str, *values: Any) -> Any:
        """Runs a statement."""
        if statement == "COMMIT":
            return self._disk.commit(lambda: self._connection.execute("COMMIT"))
        return self._connection.execute(statement, *values)

    @property
    def in_transaction(self) -> bool:
        """Whether there is something to take back."""
        return self._alive and bool(self._connection.in_transaction)

    def close(self) -> None:
        """Closes the file; what was not committed is lost."""
        self._alive = False
        self._connection.close()


@contextmanager
def simulated_wallets() -> Iterator[None]:
    """Has processes that share a wallet look less often for what the others did."""
    with mock.patch("x402mw_client.books.POLL_SECONDS", POLL_SECONDS):
        yield


def open_wallet(
    network: Network,
    here: str,
    *,
    escrow: str,
    api_key: str,
    limits: Limits,
    deposit: str,
    path: Path | None,
    clock: Callable[[], float],
    disk: Disk,
    on_payment: Callable[[Any], None],
) -> tuple[SimWallet, PaymentTransport]:
    """Opens a wallet in the running process, and a transport that pays from it."""
    wallet = SimWallet(
        escrow=escrow,
        api_key=api_key,
        limits=limits,
        deposit=deposit,
        path=path,
        clock=clock,
        on_payment=on_payment,
    )
    wallet.network, wallet.here = network, here
    wallet.state.signal._waiters = Ordered()  # type: ignore[assignment]  # behaves like a set
    process, memory = HERE.get(), wallet._memory
    if process is not None:
        process.at_death.append(memory.close)
    if isinstance(memory, WalletFile):
        memory._db = Database(memory._db, disk)  # type: ignore[assignment]  # the part it uses
    transport = PaymentTransport(wallet, Wire(network, here), keep_sessions=True)
    return wallet, transport


def sessions_of(wallet: Wallet) -> list[Session]:
    """What the wallet remembers."""
    wallet.state.purse.look()
    return list(wallet.state.purse.sessions.values())


def has_doubts(wallet: Wallet) -> bool:
    """Whether there are calls whose charge is not known, and that nobody waits for."""
    wallet.state.purse.recover()
    return any(session.doubtful for session in sessions_of(wallet))
