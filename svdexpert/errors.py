"""The errors of the library: one family, a few kinds.

Every message says what is wrong, what was found, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SvdExpertError(Exception):
    """Anything that svdexpert refuses to do."""


class BasisError(SvdExpertError):
    """A model that cannot be decomposed as asked: no adaptable matrix, a quantised base, k larger than the rank."""


class ExpertError(SvdExpertError):
    """An expert folder, or a value, that is not a sound expert: truncated, altered, wrong shapes, NaN, a pickle."""


class UnknownExpertError(ExpertError, KeyError):
    """A name that a library does not hold; also a KeyError, so that `get` and `pop` of a mapping work."""

    __str__ = Exception.__str__


class MismatchError(SvdExpertError):
    """A sound expert that was made for another basis: other weights, revision, support, first layer or core."""


class MixtureError(SvdExpertError):
    """A mixture that does not describe the batch it is used with: unknown names, wrong number of rows or tokens."""


class ExportError(SvdExpertError):
    """An export that would lose something, or that its reader would refuse."""


class SkillError(SvdExpertError):
    """A skill, a case or a tool schema that is not what the protocol asks for."""


class WorldError(SvdExpertError):
    """A world that cannot make what was asked: missing, renamed or truncated files, too few different scenes."""


class TooLongError(SvdExpertError):
    """A conversation whose last turn alone is longer than the model's context."""


class TrainingError(SvdExpertError):
    """A run that cannot begin, or must not go on: settings out of range, data that does not parse, NaN, no signal."""


class DispatchError(SvdExpertError):
    """A decision that cannot be taken: no experts, an expert that is missing, too few examples, another base."""


class MeasurementError(SvdExpertError):
    """A measurement that its numbers do not allow: none at all, lengths that differ, NaN."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" or the list of what exists, to end an error message about an unknown name.

    Args:
        name: what was asked for.
        known: every name that exists.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    if not names:
        return " There are none."
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f" There are: {shown}."
