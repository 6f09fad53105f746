"""A deterministic simulation: the real buyer, provider and escrow in one thread and one seed.

Every line of production code that decides about money runs as it is: transports, middleware, gate,
journal, redeemer, escrow API and ledger. Only the world around it is made up: an event loop with
its own time (`loop`), a network that loses, doubles and delays (`network`), clocks that are wrong,
disks that fail, processes that die, and randomness that comes from the seed (`patches`).

    python -m tests.simulation --seeds 1000        many seeds, a summary
    python -m tests.simulation --seed 17 --trace   one seed again, step by step
"""
