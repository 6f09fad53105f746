"""Live and test, which never mix: money of test tenants is an asset of its own in the books.

Assets never add (M5), every account holds one, and an entry moves money between accounts of its own
asset: so the books themselves keep test money away from live money. To people both are called by
the asset's code.
"""

LIVE, TEST = "live", "test"
MODES = (LIVE, TEST)
PUBLIC = {LIVE: "public", TEST: "public-test"}
"""The tenant of agents that register by themselves, for each mode."""

_TEST = ":test"


def asset_of(code: str, mode: str) -> str:
    """The asset that tenants of a mode trade in, as the books name it."""
    return code + _TEST if mode == TEST else code


def mode_of(asset: str) -> str:
    """The mode that an asset of the books belongs to."""
    return TEST if asset.endswith(_TEST) else LIVE


def shown(asset: str) -> str:
    """The code of an asset as people read it."""
    return asset.removesuffix(_TEST)


def world(asset: str) -> str:
    """The account behind all money of an asset: the only one that may be below zero."""
    return "world" + _suffix(asset)


def faucet(asset: str) -> str:
    """The account that first money is given from."""
    return "faucet" + _suffix(asset)


def house(asset: str) -> str:
    """The account that fees go to."""
    return "house:fees" + _suffix(asset)


def _suffix(asset: str) -> str:
    return _TEST if asset.endswith(_TEST) else ""
