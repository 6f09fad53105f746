"""The words that requests and answers of the API choose from."""

from typing import Literal

Kind = Literal["manual", "session"]
Status = Literal[
    "locked",
    "partially_released",
    "delivered",
    "disputed",
    "closing",
    "released",
    "refunded",
    "settled",
]
