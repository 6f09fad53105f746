"""The schema's history, run by `database.migrate` when the service starts."""
