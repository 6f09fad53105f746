"""Shells around the core for those who sell: middleware, meter, journal, redeemer."""
