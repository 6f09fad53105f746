"""The protocol and the money rules. Pure: no clock, no randomness, no environment, no I/O."""
