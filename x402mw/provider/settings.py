"""The provider's settings from the environment: the one place of this package that reads it."""

import os
from collections.abc import Mapping
from typing import Any

from x402mw.core.errors import ConfigurationError

ESCROW = "X402MW_ESCROW"
API_KEY = "X402MW_API_KEY"
JOURNAL = "X402MW_JOURNAL"
ORIGINS = "X402MW_ORIGINS"
ESCROW_ROOT = "X402MW_ESCROW_ROOT"

JOURNAL_DEFAULT = "x402mw-journal.db"


def read_settings(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reads what `Provider(...)` takes from `X402MW_*` variables.

    `x402mw register` prints them. Raises `ConfigurationError` naming what is missing.
    """
    found = os.environ if environment is None else environment
    missing = [name for name in (ESCROW, API_KEY) if not found.get(name, "").strip()]
    if missing:
        raise ConfigurationError(
            f"{' and '.join(missing)} must be set; `x402mw register` prints the lines to export"
        )
    origins = found.get(ORIGINS, "").replace(",", " ").split()
    return {
        "escrow": found[ESCROW].strip(),
        "api_key": found[API_KEY].strip(),
        "journal": found.get(JOURNAL, "").strip() or JOURNAL_DEFAULT,
        "origins": origins,
        "escrow_root": found.get(ESCROW_ROOT, "").strip() or None,
    }
