"""Locks of the operating system, by which the worker processes of one host know of each other.

A lock falls with the process that holds it, however that ends, so there is nothing to clean up. The
files stay: deleting one would let two processes lock two different files of one name. A forked
child gives up its share at once, or a lock could outlive the worker that took it.
"""

import contextlib
import fcntl
import os
import weakref

OWNER_ONLY = 0o600


class FileLock:
    """One file's lock, through a descriptor of its own: two of one path exclude each other."""

    def __init__(self, path: str) -> None:
        """Opens or creates the file; raises `OSError`."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, OWNER_ONLY)
        _open_locks.add(self)

    def take(self) -> None:
        """Takes it for us alone, waiting for as long as that takes."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def try_take(self) -> bool:
        """Takes it for us alone, if it is free."""
        return self._try(fcntl.LOCK_EX)

    def try_share(self) -> bool:
        """Takes it together with others who share it, if nobody has it alone."""
        return self._try(fcntl.LOCK_SH)

    def give(self) -> None:
        """Gives it up; it can be taken again."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Gives it up for good; may be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


_open_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _close_inherited() -> None:
    for lock in list(_open_locks):
        with contextlib.suppress(OSError):
            lock.close()


os.register_at_fork(after_in_child=_close_inherited)
