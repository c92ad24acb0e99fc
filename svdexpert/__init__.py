"""Singular-value expert vectors: many skills on one base model, any mixture in any row of a batch.

    W  = U diag(s) V^T                     the frozen weight, decomposed once
    W' = U diag(s * (1 + d)) V^T           an expert: d, one offset per kept singular direction (Transformer^2)
    y  = W x + U_k ((s * d)_k * V_k^T x)   how it is applied: d = 0 is the base, bit for bit

Shapes are named by the same letters everywhere: `b` rows of a batch, `t` tokens, `o` out features, `i` in features,
`k` kept singular directions of one matrix, `n` all kept directions of all adapted matrices side by side (numbers of an
expert), `e` experts, `v` vocabulary.

Names resolve on first use, so that importing the package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Basis": "basis",
    "decompose": "basis",
    "Expert": "expert",
    "Library": "library",
    "conflict": "expert",
    "Bank": "mixture",
    "Mixture": "mixture",
    "SpectralModel": "model",
    "check_lora": "export",
    "export_lora": "export",
    "merge": "export",
    "Recipe": "recipe",
    "train": "training",
    "train_library": "training",
    "BasisError": "errors",
    "DispatchError": "errors",
    "ExpertError": "errors",
    "ExportError": "errors",
    "MismatchError": "errors",
    "MixtureError": "errors",
    "SvdExpertError": "errors",
    "TrainingError": "errors",
    "UnknownExpertError": "errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from svdexpert.basis import Basis as Basis
    from svdexpert.basis import decompose as decompose
    from svdexpert.errors import BasisError as BasisError
    from svdexpert.errors import DispatchError as DispatchError
    from svdexpert.errors import ExpertError as ExpertError
    from svdexpert.errors import ExportError as ExportError
    from svdexpert.errors import MismatchError as MismatchError
    from svdexpert.errors import MixtureError as MixtureError
    from svdexpert.errors import SvdExpertError as SvdExpertError
    from svdexpert.errors import TrainingError as TrainingError
    from svdexpert.errors import UnknownExpertError as UnknownExpertError
    from svdexpert.expert import Expert as Expert
    from svdexpert.expert import conflict as conflict
    from svdexpert.export import check_lora as check_lora
    from svdexpert.export import export_lora as export_lora
    from svdexpert.export import merge as merge
    from svdexpert.library import Library as Library
    from svdexpert.mixture import Bank as Bank
    from svdexpert.mixture import Mixture as Mixture
    from svdexpert.model import SpectralModel as SpectralModel
    from svdexpert.recipe import Recipe as Recipe
    from svdexpert.training import train as train
    from svdexpert.training import train_library as train_library


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'svdexpert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"svdexpert.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
