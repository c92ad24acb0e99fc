"""Functions beside the town's, for training alone: what the parameters of other splits are called, and how people give
them.

The town has 14 functions in its train split. Models that had read these and made-up ones gave `move_booking` the time
as its booking, or asked for it, where users said "number N6683": what a parameter is and how people give it no
signature shows. Before, 148 functions in peculiar words were tried (LOG.md). The words are in services.toml.

Those of unseen.toml are for validation alone: same parameters, in other combinations and wordings. The town's
validation split has two functions that training has not, which says little about the next one.
"""

from __future__ import annotations

import random
import tomllib
from functools import cache
from pathlib import Path

from svdexpert.worlds import Split
from svdexpert.worlds.town import KITS, PARAMS, Bank, Dice, Kit, Param, Town


@cache
def services(split: Split = "train") -> dict[str, Kit]:
    """Return the functions of train or validation by name; a parameter that is not listed there is the town's."""
    path = Path(__file__).parent / ("services.toml" if split == "train" else "unseen.toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    known = dict(PARAMS)
    for name, row in tables["params"].items():
        known[name] = Param(name, row["kind"], row["words"], tuple(row["inline"]), tuple(row["asks"]))
    found = {}
    for name, row in tables["kits"].items():
        required, optional = tuple(row["required"]), tuple(row["optional"])
        found[name] = Kit(
            name,
            split=split,
            required=required,
            optional=optional,
            thing=row["thing"],
            done=row["done"],
            fields=tuple(row["fields"]),
            cores=Bank(row["cores"]),
            params={one: known[one] for one in (*required, *optional)},
        )
    return found


class UnseenDice(Dice):
    """Dice whose functions are the town's of the train split and those of unseen.toml."""

    def kits(self) -> list[Kit]:
        """Return the functions that the split may list."""
        return [*(kit for kit in KITS.values() if kit.split == "train"), *services("validation").values()]


class UnseenTown(Town):
    """The town, its validation split with functions that training has not."""

    def dice(self, split: Split, seed: str) -> Dice:
        """Return what scenes of the validation split are drawn with."""
        assert split == "validation", split
        return UnseenDice(random.Random(seed), split, *self._settled[split])
