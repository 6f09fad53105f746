"""One server of the bench: `python -m bench.serve NAME PORT [WORKERS]`.

Same server, same app, same handler for all; only what stands in front of the app differs.
"""

import json
import os
import sys
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from bench import floor, handlers, load
from x402mw.provider import PaymentMiddleware, PerCall, PerUnit, Provider

SETTINGS = "X402MW_BENCH"
NAME = "X402MW_BENCH_SERVER"
PRICE = "0.0001"
PRICES = {
    **{f"GET /item{ending}": PerCall(PRICE) for ending in handlers.PATHS},
    "GET /stream": PerUnit("chunk", "0.000001", max_units=100_000),
}


def ours(durability: str) -> ASGIApp:
    """Our middleware, with its defaults but for the durability."""
    settings = json.loads(os.environ[SETTINGS])
    app = handlers.bare()
    provider = Provider(**settings, durability=durability)
    app.add_middleware(PaymentMiddleware, provider=provider, prices=PRICES)
    return app


def _peer(name: str) -> Callable[[], ASGIApp]:
    def make() -> ASGIApp:
        from bench import peers

        return peers.APPS[name]()

    return make


APPS: dict[str, Callable[[], ASGIApp]] = {
    "bare": handlers.bare,
    "ours-fsync": lambda: ours("fsync"),
    "ours-process": lambda: ours("process"),
    "floor-fsync": lambda: floor.make(wait=True),
    "floor-process": lambda: floor.make(wait=False),
    "x402-exact": _peer("x402-exact"),
    "x402-batch": _peer("x402-batch"),
    "pympp": _peer("pympp"),
}


def make() -> ASGIApp:
    """The app of this process."""
    return APPS[os.environ[NAME]]()


def main(name: str, port: str, workers: str = "1") -> None:
    """Serves until it is told to stop; a single worker stays on core 0."""
    if workers == "1":
        load.pin(0)
    os.environ[NAME] = name
    uvicorn.run(
        "bench.serve:make",
        factory=True,
        port=int(port),
        workers=int(workers),
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
