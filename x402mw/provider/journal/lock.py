"""The operating system's lock that makes one process the only one with a journal.

It is held for life and falls with the process, however that ends, so there is nothing to clean up.
The file stays: deleting it would let two processes lock two different files of one name.
"""

import fcntl
import os

from x402mw.core.errors import ConfigurationError
from x402mw.provider.journal.errors import JournalLocked

OWNER_ONLY = 0o600


def take_lock(path: str) -> int:
    """Locks `<path>.lock` and returns its descriptor; `JournalLocked` names who has it instead."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, OWNER_ONLY)
    except OSError as error:
        raise ConfigurationError(f"the journal {path} cannot be locked: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise JournalLocked(
            f"the journal {path} is in use by process {owner}; "
            "run one process per journal, or give this one a journal of its own"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def release_lock(descriptor: int) -> None:
    """Gives the lock up."""
    os.close(descriptor)
