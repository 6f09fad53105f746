"""The audit chain: read from a database or an export, verified, and compared with an older one."""
