"""Parts of skills: eight skills out of two, to see how many experts add up. One file a part.

`call` by family of functions, `disagree` by kind of claim. Controls are those of the whole skill.
"""

from __future__ import annotations

from collections.abc import Callable

from svdexpert.skills import Case, Skill, alternate, half, load
from svdexpert.worlds import Split, World

BOOKINGS = {"book_table", "book_doctor", "reserve_room", "book_haircut", "hire_guide", "enrol_course", "rent_bike"}
ORDERS = {"order_taxi", "buy_ferry_tickets", "order_groceries", "order_flowers"}
ERRANDS = {"send_parcel", "report_fault", "renew_library_card", "hire_plumber", "transfer_money", "move_booking"}
HOME = {"find_place", "play_music", "set_reminder", "get_opening_hours"}
MANY = 12  # times as many cases are drawn as are wanted; a part holds at least so small a share


def calls(*, of: set[str]) -> Callable[..., list[Case]]:
    """Return `cases` of calls of some functions."""
    return part(load("call"), lambda case: case.truth["call"]["name"] in of)


def claims(*, tags: set[str]) -> Callable[..., list[Case]]:
    """Return `cases` of claims of some kinds."""
    return part(load("disagree"), lambda case: bool(tags & set(case.tags)))


def part(skill: Skill, keep: Callable[[Case], bool]) -> Callable[..., list[Case]]:
    """Return `cases` of a skill whose positives are kept by a rule."""

    def cases(world: World, split: Split, n: int, *, seed: int = 0) -> list[Case]:
        drawn = skill.cases(world, split, MANY * n, seed=seed)
        positives = [case for case in drawn if case.positive and keep(case)][: half(n)]
        controls = [case for case in drawn if not case.positive][: len(positives)]
        return alternate(positives, controls)

    return cases
