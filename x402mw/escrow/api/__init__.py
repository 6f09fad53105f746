"""The escrow's HTTP API: one small function for each route of `docs/escrow.md`.

Each function reads its request, hands one operation to the ledger and writes the answer. Who may
do what is decided by the operations.
"""
