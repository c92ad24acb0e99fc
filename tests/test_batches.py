"""Rows are functions of (seed, step, row), whoever trains beside and however parts are dealt."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from svdexpert.batches import Neutral, Plan, Row, Steps
from svdexpert.examples import Example, Examples


def some(skill: str, n: int = 12) -> Examples:
    rows = [
        Example(
            id=f"{skill}/{place}",
            positive=place % 2 == 0,
            context="",
            prompt=[place + 3] * (place + 1),
            chosen=["a", "b"],
            chosen_ids=[[5], [6, 7]],
            rejected=["c", "d"],
            rejected_ids=[[8], [9]],
            errors=["wrong", "wrong"],
            own_ids=[5],
        )
        for place in range(n)
    ]
    return Examples(skill, tuple(rows))


NEUTRALS = (Neutral("", [3, 4], [5, 2]), Neutral("ask", [6], [7, 2]), Neutral("doubt", [8], [9, 2]))


def plan(
    skills: tuple[str, ...] = ("ask", "doubt"), frozen: tuple[str, ...] = (), seed: int = 0, **changes: float
) -> Plan:
    settings = {"mixing": 0.5, "neutral": 0.25} | changes
    return Plan([some(one) for one in skills], NEUTRALS, frozen, "pair", 8, seed=seed, **settings)


def test_a_step_has_its_rows() -> None:
    rows = plan().rows(3)
    assert len(rows) == 16
    for expert in (0, 1):
        ours = [row for row in rows if row.expert == expert]
        assert Counter(row.target is None for row in ours) == {True: 6, False: 2}
        assert all(row.weights[expert] == 1.0 for row in ours)
        own = [int(row.case.rpartition("/")[2]) % 2 == 0 for row in ours if row.case]
        assert sum(own) == 3  # positives and controls in equal numbers
    assert [row.length for row in rows] == sorted(row.length for row in rows)
    assert plan().rows(3) == rows
    assert plan(seed=1).rows(3) != rows


def test_every_example_comes_once_an_epoch() -> None:
    rows = [row for step in range(4) for row in plan(("ask",), neutral=0.0).rows(step)]
    # 32 rows: 16 of 6 positives, 16 of 6 controls
    assert set(Counter(row.case for row in rows).values()) <= {2, 3}


def test_the_wrong_reply_of_the_base_is_rejected_most() -> None:
    one = some("ask")
    wrong = Examples("ask", tuple(replace(row, own_ids=[9]) for row in one.rows))
    counted = []
    for examples in (one, wrong):
        drawn = Plan([examples], (), (), "pair", 8, mixing=0.0, neutral=0.0, seed=0)
        counted.append(Counter(row.completions[1][0] for step in range(100) for row in drawn.rows(step)))
    assert 0.4 < counted[0][9] / 800 < 0.6  # [5] is right
    assert 0.7 < counted[1][9] / 800 < 0.8


def test_another_expert_beside_changes_no_row() -> None:
    def cases(of: Plan) -> list[tuple[str, list[list[int]]]]:
        rows = [row for row in of.rows(5) if row.expert == 0 and row.case]
        return sorted((row.case, row.completions) for row in rows)

    assert cases(plan(("ask",), neutral=0.0)) == cases(plan(("ask", "doubt"), neutral=0.0))


def test_weights_of_others_are_drawn_as_they_should_be() -> None:
    drawn = [
        weight
        for step in range(400)
        for row in plan(frozen=("old", "older")).rows(step)
        if not row.case or int(row.case.rpartition("/")[2]) % 2 == 0  # in controls nobody else speaks
        for weight in row.weights[2:]
    ]
    n = len(drawn)
    assert sum(one == 0 for one in drawn) / n == pytest.approx(0.5, abs=0.02)
    assert sum(one == 1 for one in drawn) / n == pytest.approx(0.25, abs=0.02)
    assert sum(0 < one < 1 for one in drawn) / n == pytest.approx(0.25, abs=0.02)
    assert not any(weight for row in plan(frozen=("old", "older"), mixing=0.0).rows(0) for weight in row.weights[2:])


def test_nobody_else_speaks_in_controls() -> None:
    positive = {row.id: row.positive for name in ("ask", "doubt") for row in some(name).rows}
    for row in (row for step in range(40) for row in plan(frozen=("old",), mixing=1.0).rows(step) if row.case):
        others = [weight for place, weight in enumerate(row.weights) if place != row.expert]
        assert row.weights[row.expert] == 1.0
        assert all(others) if positive[row.case] else not any(others)


def test_experts_of_one_move_speak_as_one_in_one_anothers_controls_and_are_no_neutral_contexts() -> None:
    names = ("ask", "doubt", "query")
    neutrals = (*NEUTRALS, Neutral("query", [10], [11, 2]))
    examples = [some(name) for name in names]
    of = Plan(examples, neutrals, ("old",), "pair", 8, mixing=1.0, neutral=0.25, seed=0, moves=["ask", "doubt", "ask"])
    positive = {row.id: row.positive for one in examples for row in one.rows}
    owner = {tuple(one.prompt): one.owner for one in neutrals}
    alike = {0: {0, 2}, 1: {1}, 2: {0, 2}}
    seen = set()
    for row in (row for step in range(60) for row in of.rows(step)):
        speak = {place for place, weight in enumerate(row.weights) if weight}
        assert row.weights[0] == row.weights[2] or row.expert in (0, 2)
        if row.case:
            assert speak == ({0, 1, 2, 3} if positive[row.case] else alike[row.expert])
        elif whose := owner[tuple(row.prompt)]:
            owners = alike[names.index(whose)]
            assert row.expert not in owners
            assert speak == {0, 1, 2, 3} - owners
            seen.add((row.expert, whose))
    assert seen == {(0, "doubt"), (1, "ask"), (1, "query"), (2, "doubt")}
    without = plan(frozen=("old",))
    assert [replace(without, moves=["a", "b"]).rows(step) for step in range(9)] == [
        without.rows(step) for step in range(9)
    ]


def test_parts_and_processes_deal_the_same_rows() -> None:
    def dealt(accumulate: int, processes: int) -> list[Row]:
        found = []
        for rank in range(processes):
            parts = Steps(plan(), lambda: 2, accumulate, rank, processes)
            found += [row for part in islice(parts, accumulate) for row in part]
        return sorted(found, key=str)

    assert dealt(1, 1) == dealt(4, 1) == dealt(1, 2) == dealt(2, 3)


def test_a_frozen_expert_speaks_in_the_contexts_of_its_skill() -> None:
    rows = [row for step in range(50) for row in plan(("ask",), frozen=("doubt", "old")).rows(step) if row.target]
    theirs = [row for row in rows if row.prompt == [8]]  # the context of "doubt" in NEUTRALS
    assert theirs
    for row in theirs:
        assert row.weights[:2] == [1.0, 1.0]
        assert row.target == [0.0, *row.weights[1:]]


def test_a_neutral_row_never_asks_for_the_base_where_an_expert_is_due() -> None:
    rows = [row for step in range(60) for row in plan(frozen=("old",), mixing=1.0).rows(step) if row.target]
    owner = {tuple(one.prompt): one.owner for one in NEUTRALS}
    seen = Counter()
    for row in rows:
        whose = owner[tuple(row.prompt)]
        names = ["ask", "doubt", "old"]
        assert whose != names[row.expert]
        if whose:
            assert row.weights[names.index(whose)] == 0.0
        assert row.target == [0.0, 0.0, row.weights[2]]
        seen[whose] += 1
    assert min(seen[""], seen["ask"] + seen["doubt"]) > 0.4 * len(rows)


def test_own_rows_are_even_whatever_the_share() -> None:
    for share in (0.0, 0.1, 0.25, 0.4, 0.9, 1.0):
        found = plan(neutral=share)
        assert found.own_rows % 2 == 0
        assert found.own_rows >= 2
        assert found.own_rows + found.neutral_rows == 8
