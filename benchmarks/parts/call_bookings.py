"""call, for the functions of one family."""

from benchmarks.parts import BOOKINGS, calls
from svdexpert.skills.call import DEGENERATE, MOVE, OPENINGS, verify

__all__ = ["DEGENERATE", "MOVE", "OPENINGS", "cases", "verify"]

cases = calls(of=BOOKINGS)
