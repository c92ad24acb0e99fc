"""Functions beside the town's, for training alone: what the parameters of other splits are called, and how people give
them.

The town has 14 functions in its train split. A model that had read these and made-up ones asked for the stylist where
users said "with Marta": what a word means and how a detail is said has to be known, no signature shows it. Before,
148 functions in peculiar words were tried (LOG.md). The words are in services.toml.
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
