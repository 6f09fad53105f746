"""The escrow's root key: where it is kept, and what is refused."""

from pathlib import Path

import pytest

from x402mw.core.errors import ConfigurationError
from x402mw.core.strict import b64url_encode
from x402mw.escrow.keys import Signer, load_root_seed
from x402mw.escrow.settings import Settings

SEED = bytes(range(32))


def test_a_root_key_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    """Keys: the root key is a file of mode 0600 that is read again at every start."""
    path = tmp_path / "escrow.db.rootkey"
    seed = load_root_seed(path, None, may_create=True)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_root_seed(path, None, may_create=True) == seed
    assert load_root_seed(path, None, may_create=False) == seed


def test_a_root_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Security: secrets are never in world-readable files."""
    path = tmp_path / "rootkey"
    load_root_seed(path, None, may_create=True)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod"):
        load_root_seed(path, None, may_create=True)


def test_the_environment_may_hold_the_root_key(tmp_path: Path) -> None:
    """Keys: an environment variable (base64url) replaces the file."""
    path = tmp_path / "rootkey"
    assert load_root_seed(path, b64url_encode(SEED), may_create=True) == SEED
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "x", "A" * 44, "=" * 43])
def test_malformed_root_keys_are_refused(tmp_path: Path, text: str) -> None:
    """Failures: a broken key is found at start, wherever it stands."""
    with pytest.raises(ConfigurationError):
        load_root_seed(None, text, may_create=True)
    path = tmp_path / "rootkey"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError):
        load_root_seed(path, None, may_create=True)


def test_a_lost_root_key_is_not_replaced(tmp_path: Path) -> None:
    """Failures: beside an old database a missing key is an error, never a new key."""
    for path in (tmp_path / "lost", None, tmp_path / "no" / "folder"):
        with pytest.raises(ConfigurationError):
            load_root_seed(path, None, may_create=path is not None and "folder" in path.name)


def test_signing_keys_come_from_the_root_and_differ() -> None:
    """Keys: each number gives its own seed, the same at every start, never the root itself."""
    seeds = [Signer(Settings("x.db", SEED)).seed(number) for number in (1, 2, 3, 1)]
    assert seeds[0] == seeds[3]
    assert len({*seeds, SEED}) == 4


def test_secrets_stay_out_of_representations() -> None:
    """Security: a settings object in a log shows no key."""
    assert repr(SEED) not in repr(Settings("x.db", SEED))
