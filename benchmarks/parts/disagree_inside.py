"""disagree, for claims of one kind."""

from benchmarks.parts import claims
from svdexpert.skills.disagree import DEGENERATE, MOVE, OPENINGS, verify

__all__ = ["DEGENERATE", "MOVE", "OPENINGS", "cases", "verify"]

cases = claims(tags={"inside_request", "premise"})
