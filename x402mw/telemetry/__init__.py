"""For operators: where figures and log records go."""
