"""A buyer in one file: gets the addresses it is given, and pays for them.

    python -m demo_provider.buyer http://127.0.0.1:8402/quote/BTC

It reads `X402MW_ESCROW` and `X402MW_API_KEY`, and spends at most 0.10 in all.
"""

import os
import sys

import httpx

from x402mw.core.amounts import display
from x402mw.core.errors import X402mwError
from x402mw_client import Limits, SyncPaymentTransport, Wallet


def main(addresses: list[str]) -> int:
    """Gets each address in turn; returns the exit status."""
    try:
        wallet = Wallet(
            escrow=os.environ["X402MW_ESCROW"],
            api_key=os.environ["X402MW_API_KEY"],
            limits=Limits(per_request="0.05", total="0.10"),
        )
        with httpx.Client(transport=SyncPaymentTransport(wallet)) as http:
            for address in addresses:
                answer = http.get(address)
                print(answer.status_code, answer.text.strip())
    except KeyError as missing:
        print(f"set {missing.args[0]}; `x402mw register` prints it", file=sys.stderr)
        return 2
    except (X402mwError, httpx.HTTPError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"paid {display(wallet.spent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
