"""What the demo reads and tells."""

STORY = """\
A merchant sold one thing only: the answer to the next question. Nobody had an account with her, and
she trusted nobody. Each buyer put a purse on the scale, asked, and watched the scale while she
spoke; whatever she had not said when she stopped stayed in the purse. She grew neither rich nor
poor, and was never once called a thief.
"""

ARTICLE = """\
Software has begun to buy from software. A call is a purchase, and a purchase wants a price. What a
call used is known only when it is done. So the price of a call is a promise, and the charge of a
call is a fact.
"""
