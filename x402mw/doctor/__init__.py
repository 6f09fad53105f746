"""`x402mw doctor URL`: asks a provider without paying, and tells what stands in its way.

It sends a dozen small requests to the URL's own origin and two to the escrow that the terms name
(https or this machine only), follows no redirect, and reads no more than 64 KiB of any answer.
"""
