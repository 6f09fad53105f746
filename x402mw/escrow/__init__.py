"""The escrow: a ledger service that locks, pays out what is proven, and gives the rest back."""
