"""Locks of the operating system beside a wallet file: who holds one is alive.

They fall with their process, however it ends, and never because it is slow or stopped. Each is a
file of its own that is deleted by its holder, so nothing piles up. The wallet file itself is never
opened here: closing any descriptor of it would drop the locks that SQLite keeps on it.
"""

import glob
import hashlib
import os

from x402mw.core.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # pragma: no cover (no Unix)
    fcntl = None  # type: ignore[assignment]  # there are no wallet files then

OWNER_ONLY = 0o600


class Locks:
    """The locks beside one wallet file that this wallet holds; no call of it ever waits."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises `ConfigurationError` where there are no such locks."""
        if fcntl is None:  # pragma: no cover (no Unix)
            raise ConfigurationError("a wallet file needs a Unix system; use a wallet in RAM")
        # One file has one name here, as it has for SQLite, whichever link leads to it.
        self._path = os.path.realpath(os.fspath(path))
        self._process = os.getpid()
        self._held: dict[object, int] = {}

    def take(self, name: object) -> bool:
        """Takes a lock, or tells that somebody has it."""
        while True:
            try:
                found = os.open(self._file(name), os.O_RDWR | os.O_CREAT, OWNER_ONLY)
            except OSError as error:
                raise ConfigurationError(f"the wallet file cannot be locked: {error}") from None
            if not _try(found):
                os.close(found)
                return False
            if _is_current(found, self._file(name)):
                self._held[name] = found
                return True
            # Its holder deleted it between our two steps.
            os.close(found)

    def release(self, name: object) -> None:
        """Gives a lock back; a forked copy of this process has none of its own to give."""
        found = self._held.pop(name)
        if os.getpid() == self._process:
            if _is_current(found, self._file(name)):
                os.unlink(self._file(name))
            # A forked copy may still have the descriptor.
            fcntl.flock(found, fcntl.LOCK_UN)
        os.close(found)

    def is_free(self, name: object) -> bool:
        """Whether nobody holds a lock."""
        return _tidy(self._file(name))

    def close(self) -> None:
        """Gives all locks back, and deletes the files of those whom dead processes had."""
        for name in list(self._held):
            self.release(name)
        if os.getpid() == self._process:
            for left in glob.glob(f"{glob.escape(self._path)}.*.lock"):
                _tidy(left)

    def _file(self, name: object) -> str:
        return f"{self._path}.{hashlib.sha256(repr(name).encode()).hexdigest()[:16]}.lock"


def _tidy(file: str) -> bool:
    """Whether nobody holds the lock of a file; then the file is deleted."""
    try:
        found = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return True
    free = _try(found)
    if free and _is_current(found, file):
        os.unlink(file)
    os.close(found)
    return free


def _is_current(descriptor: int, file: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
