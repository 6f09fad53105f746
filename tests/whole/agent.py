"""One process of an agent: buys from the shop with the wallet file that it shares with others.

It prints a line per call, `name outcome`, and at its end `spent` with the wallet's own figure.
"""

# ruff: noqa: T201 (what it prints is for its test)

import asyncio
import os
import sys

import httpx

from x402mw_client import LimitExceeded, Limits, PaymentTransport, Wallet, X402mwError

AT_ONCE = 8


async def shop(http: httpx.AsyncClient, name: str, calls: int) -> None:
    """Buys until there is no more money, or no more to buy."""
    for number in range(calls):
        try:
            answer = await http.get(f"{os.environ['SHOP']}/item/{name}-{number}?sleep=2")
            outcome = str(answer.status_code)
        except LimitExceeded as error:
            print(name, f"limit-{error.limit}", flush=True)
            return
        except (X402mwError, httpx.TransportError) as error:
            outcome = type(error).__name__
        print(f"{name}-{number}", outcome, flush=True)


async def main(name: str, calls: int) -> None:
    """Shops with several tasks at once, then leaves the wallet to the other processes."""
    wallet = Wallet(
        escrow=os.environ["ESCROW"],
        api_key=os.environ["BUYER_KEY"],
        limits=Limits(per_request="0.01", total=os.environ["TOTAL"]),
        path=os.environ["WALLET"],
    )
    async with httpx.AsyncClient(transport=PaymentTransport(wallet), timeout=20) as http:
        async with asyncio.TaskGroup() as tasks:
            for task in range(AT_ONCE):
                tasks.create_task(shop(http, f"{name}{task}", calls))
        print("spent", wallet.spent, flush=True)


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
