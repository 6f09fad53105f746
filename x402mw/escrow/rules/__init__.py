"""What an escrow may do, as pure functions: state and event in, state out.

Rules M1 and 3 to 6 of `docs/money.md`. Nothing here reads a clock or a database. An operation makes
a new value from an old one, and `money.transfers` tells which money that difference moves, so the
books can never disagree with the state.

    values     an escrow, its statuses, and a movement of money
    table      the one transition table of both kinds
    money      fee, referral and revenue split; the movements between two states
    outage     deadlines after the escrow was down
    session    vouchers: L and R only grow until the close
    agreement  what a manual escrow is: parts, dispute, carry
    step       how every event of one ends, and what time does next
    dispute    held money: an arbiter shares it out, or time
    manual     the buyer releases: milestones, deliveries, conditions
"""
