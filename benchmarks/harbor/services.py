"""Functions beside the town's, for training alone: what the parameters of other splits are called, and how people give
them.

The town has 14 functions in its train split. Models that had read these and made-up ones gave `move_booking` the time
as its booking, or asked for it, where users said "number N6683": what a parameter is and how people give it no
signature shows. Before, 148 functions in peculiar words were tried (LOG.md). The words are in services.toml.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from svdexpert.worlds.town import PARAMS, Bank, Kit, Param


@cache
def services() -> dict[str, Kit]:
    """Return the functions by name; a parameter that is not listed here is the town's."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    known = dict(PARAMS)
    for name, row in tables["params"].items():
        known[name] = Param(name, row["kind"], row["words"], tuple(row["inline"]), tuple(row["asks"]))
    found = {}
    for name, row in tables["kits"].items():
        required, optional = tuple(row["required"]), tuple(row["optional"])
        found[name] = Kit(
            name,
            split="train",
            required=required,
            optional=optional,
            thing=row["thing"],
            done=row["done"],
            fields=tuple(row["fields"]),
            cores=Bank(row["cores"]),
            params={one: known[one] for one in (*required, *optional)},
        )
    return found
