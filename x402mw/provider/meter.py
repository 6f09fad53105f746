"""The handler's side of a paid call: `request.state.payment`."""

from x402mw.core.amounts import USDC, Atomic, display
from x402mw.core.errors import AlreadySettled, WrongUnit
from x402mw.core.terms import Terms


class Payment:
    """Counts what a handler used: `request.state.payment.charge(tokens=512)`.

    `payer` and `session` are ids, `maximum` is what this call can cost at most (atomic units).
    """

    def __init__(self, terms: Terms, *, payer: str, session: str) -> None:
        """Made by the middleware, one for each admitted call."""
        self.payer = payer
        self.session = session
        self.maximum: Atomic = terms.amount
        self.used = 0
        self._names = _spellings(terms.unit)
        self._unit = terms.unit
        self._settled = False

    def charge(self, **quantities: int) -> None:
        """Adds to what this call used; the keyword is the unit of its price, or the plural.

        Calls add up. More than the maximum is recorded and charged at the maximum. Raises
        `WrongUnit` for any other keyword or a quantity that is no whole number, and
        `AlreadySettled` once the final figure has gone to the buyer.
        """
        if self._settled:
            raise AlreadySettled("the charge of this call is final; count before the answer ends")
        for name, quantity in quantities.items():
            if name not in self._names:
                wanted = f"{self._unit!r}" if self._unit else "no unit: it has one price per call"
                raise WrongUnit(f"charge({name}=...): the price of this route is in {wanted}")
            if type(quantity) is not int or quantity < 0:
                raise WrongUnit(f"charge({name}=...) takes a whole number of 0 or more")
        self.used += sum(quantities.values())

    def settled(self) -> None:
        """Closes the meter: called by the middleware when the figure is final."""
        self._settled = True

    def __repr__(self) -> str:
        """Shows the amounts; ids of buyers stay out of logs."""
        return f"Payment(used={self.used}, maximum={display(self.maximum, USDC)})"


def _spellings(unit: str) -> frozenset[str]:
    if not unit:
        return frozenset()
    plural = unit[:-1] + "ies" if unit.endswith("y") else unit + "s"
    return frozenset({unit, unit + "s", plural})
