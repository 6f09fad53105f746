"""Bugs put in on purpose: each must be found within a bounded number of seeds."""

from collections.abc import Callable
from contextlib import AbstractContextManager

MUTATIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {}
