"""Peers and ourselves, side by side: `make bench` (`docs/performance.md`)."""
