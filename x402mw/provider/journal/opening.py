"""Opening a journal: where it is, whose calls were left open, and whether its totals are true."""

from urllib.parse import urlsplit

from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal import rows
from x402mw.provider.journal.calls import recover
from x402mw.provider.journal.errors import JournalCorrupt
from x402mw.provider.journal.rows import Totals
from x402mw.provider.journal.shared import UNMET_SERIAL
from x402mw.provider.journal.sqlite import SqliteStore
from x402mw.provider.journal.store import Durability, Store
from x402mw.provider.journal.transaction import Transaction

SQLITE_SCHEME = "sqlite:///"
POSTGRESQL_SCHEMES = ("postgresql", "postgres")


def open_store(place: str, durability: Durability) -> Store:
    """Opens what a journal setting names: a path, a `sqlite:///` or a `postgresql://` URL."""
    if "://" not in place:
        return SqliteStore(place, durability)
    if place.startswith(SQLITE_SCHEME):
        return SqliteStore(place.removeprefix(SQLITE_SCHEME), durability)
    scheme = urlsplit(place).scheme.partition("+")[0]
    if scheme in POSTGRESQL_SCHEMES:
        return _open_postgresql(f"postgresql://{place.partition('://')[2]}", durability)
    raise ConfigurationError(f"a journal cannot be in {scheme}: give a file, or postgresql://...")


def _open_postgresql(url: str, durability: Durability) -> Store:
    try:
        from x402mw.provider.journal.postgresql import PostgresqlStore
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise ConfigurationError('PostgreSQL needs: pip install "x402mw[postgres]"') from None
    return PostgresqlStore(url, durability)


def resume(transaction: Transaction, store: Store) -> int:
    """Begins a worker's life: settles what was left open under its number and by other dead ones.

    The first of the workers also notes where the book stood (`shared.Shared.unmet_serial`). Returns
    the number of calls settled.
    """
    if store.alone:
        transaction.write_setting(UNMET_SERIAL, str(transaction.totals.serial))
    return recover(transaction, store.worker) + resolve(transaction, store)


def resolve(transaction: Transaction, store: Store) -> int:
    """Settles what dead workers left open; returns the number of calls."""
    busy = [worker for (worker,) in transaction.select(rows.BUSY_WORKERS)]
    dead = [worker for worker in busy if worker != store.worker and store.seize(worker)]
    return sum(recover(transaction, worker) for worker in dead)


def check_totals(store: Store) -> None:
    """Raises `JournalCorrupt` unless the totals are the sums of the rows, of one moment.

    Other workers may write meanwhile.
    """
    try:
        totals = Totals(*store.look())
        (sums,) = store.select(rows.READ_SUMS)
    finally:
        store.end()
    unredeemed, outcome_bytes, reserved, unsettled = sums
    if (unredeemed, outcome_bytes) != (totals.unredeemed, totals.outcome_bytes):
        raise JournalCorrupt("the journal's totals are not the sums of its rows; restore a backup")
    if reserved != unsettled:
        raise JournalCorrupt("sessions reserve more or less than their open calls")
