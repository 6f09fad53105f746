"""What an API key may be, and where it may go."""

import re

import httpx

from x402mw.core.errors import ConfigurationError, InsecureOrigin

_LOOPBACK = re.compile(r"127(\.[0-9]{1,3}){3}", re.ASCII)
_API_KEY = re.compile(r"[!-~]+")


def check_secure(url: httpx.URL) -> httpx.URL:
    """Returns the URL if it is https or this very machine, else raises `InsecureOrigin`."""
    if url.scheme == "https":
        return url
    local = url.host in ("localhost", "::1") or _LOOPBACK.fullmatch(url.host) is not None
    if url.scheme == "http" and local:
        return url
    raise InsecureOrigin(f"{url.scheme}://{url.host} is neither https nor this machine")


def check_api_key(api_key: str | None) -> str | None:
    """Returns the key if a header can carry it, else raises `ConfigurationError`, without it."""
    if api_key is None or _API_KEY.fullmatch(api_key):
        return api_key
    raise ConfigurationError("an API key is visible ASCII without spaces or line breaks")
