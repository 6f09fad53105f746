"""Kills and faults: seeded schedules against real processes, and an oracle outside our code.

`make faults` runs them by the thousand; `docs/testing.md` says how.
"""
