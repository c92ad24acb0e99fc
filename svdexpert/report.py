"""What people look at: tables for the terminal, pictures for a page. Nothing here computes a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from svdexpert.basis import Basis, adaptable, matrix_shape
from svdexpert.expert import Conflict, Expert, conflict
from svdexpert.storage import whole_file

if TYPE_CHECKING:
    from svdexpert.evaluate import DecisionResult, SkillResult


def model_table(model: PreTrainedModel) -> Group:
    """Return what could be adapted in a model, by kind of matrix; weights are not read."""
    modules, skipped, depth = adaptable(model)
    title = f"{type(model).__name__}: {depth} layers, {len(modules)} adaptable matrices"
    table = Table()
    for column in ("matrix", "shape (o, i)", "rank", "count", "by default"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    kinds = Counter((_kind(name), matrix_shape(module)) for name, (module, _) in modules.items())
    for (kind, shape), count in kinds.items():
        adapted = sum(
            1
            for name, (module, layer) in modules.items()
            if layer >= depth // 3 and (_kind(name), matrix_shape(module)) == (kind, shape)
        )
        _row(table, kind, f"{shape[0]} x {shape[1]}", str(min(shape)), str(count), str(adapted))
    note = f"by default experts act from layer {depth // 3} on; " + _skipped(skipped)
    return _titled(title, table, note)


def basis_table(basis: Basis) -> Group:
    """Return what a basis keeps of each kind of matrix, with the range of its singular values."""
    title = f"{basis.key}: {len(basis.names)} matrices, {sum(basis.sizes)} numbers an expert"
    table = Table()
    for column in ("matrix", "shape (o, i)", "k", "count", "s from", "to"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    kinds: dict[tuple[str, tuple[int, int], int], list[str]] = {}
    for name, one in basis.key.matrices.items():
        kinds.setdefault((_kind(name), one.shape, one.k), []).append(name)
    for (kind, shape, k), names in kinds.items():
        largest = max(float(basis.factors[name].s.max()) for name in names)
        smallest = min(float(basis.factors[name].s.min()) for name in names)
        row = (f"{shape[0]} x {shape[1]}", str(k), str(len(names)), f"{largest:.4g}", f"{smallest:.4g}")
        _row(table, kind, *row)
    note = f"experts act from layer {basis.key.first_layer} on; support {basis.key.support}; "
    return _titled(title, table, note + _skipped(basis.skipped))


def expert_table(expert: Expert, name: str) -> Group:
    """Return an expert's matrices with the size of their change, under what it is and fits."""
    numbers = sum(one.numel() for one in expert.offsets.values())
    title = f"{name}: {numbers} offsets ({expert.core}), norm {expert.norm():.4g}, for {expert.key}"
    table = Table()
    for column in ("matrix", "shape (o, i)", "k", "norm of change", "mean offset", "largest |offset|"):
        table.add_column(column, justify="left" if column == "matrix" else "right")
    for matrix, one in expert.key.matrices.items():
        offset = expert.offsets[matrix]
        cells = (float(expert.change(matrix).norm()), float(offset.mean()), float(offset.abs().max()))
        shape = f"{one.shape[0]} x {one.shape[1]}"
        _row(table, matrix, shape, str(one.k), f"{cells[0]:.4g}", f"{cells[1]:+.4f}", f"{cells[2]:.4f}")
    about = {"skill": expert.skill, "objective": expert.objective, "seed": expert.seed, **expert.scores}
    note = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
    return _titled(title, table, note)


def library_table(experts: Mapping[str, Expert]) -> Group:
    """Return a line an expert, with their sizes and scores."""
    title = f"{len(experts)} experts"
    table = Table()
    for column in ("expert", "skill", "objective", "core", "offsets", "norm", "scores"):
        table.add_column(column, justify="right" if column in ("offsets", "norm") else "left")
    for name, one in experts.items():
        numbers = str(sum(offset.numel() for offset in one.offsets.values()))
        scores = ", ".join(f"{key} {value}" for key, value in one.scores.items())
        _row(table, name, one.skill or "", one.objective or "", one.core, numbers, f"{one.norm():.4g}", scores)
    return _titled(title, table)


def conflict_table(experts: Mapping[str, Expert]) -> Group:
    """Return how every pair of experts meets: cosine of their changes, and the share of opposed energy."""
    title = "cosine of the changes (share of opposed energy)"
    table = Table()
    table.add_column("")
    for name in experts:
        table.add_column(name, justify="right")
    for name, row in zip(experts, conflict_matrix(experts), strict=True):
        _row(table, name, *(f"{one.total.cosine:+.2f} ({one.total.opposed:.2f})" for one in row))
    return _titled(title, table)


def conflict_matrix(experts: Mapping[str, Expert]) -> list[list[Conflict]]:
    """Return the conflict of every pair, in the order of the mapping."""
    return [[conflict(a, b) for b in experts.values()] for a in experts.values()]


def plot_conflict(experts: Mapping[str, Expert], path: Path) -> None:
    """Write the conflict of every pair as a heat map (PNG, PDF or SVG by the ending of the path)."""
    values = torch.tensor([[one.total.cosine for one in row] for row in conflict_matrix(experts)])
    _heat_map(values, list(experts), list(experts), "cosine of the changes of the weights", path)


def plot_expert(expert: Expert, path: Path) -> None:
    """Write an expert's offsets as a heat map: a row a matrix, a column a direction (for dense cores: the diagonal)."""
    widest = max(one.k for one in expert.key.matrices.values())
    rows = [one if one.dim() == 1 else one.diagonal() for one in expert.offsets.values()]
    values = torch.stack([torch.nn.functional.pad(row, (0, widest - row.shape[0]), value=torch.nan) for row in rows])
    _heat_map(values, list(expert.offsets), [], "offset of each direction, largest singular value first", path)


def _heat_map(values: torch.Tensor, rows: Sequence[str], columns: Sequence[str], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = values.shape
    labelled = bool(columns)
    size = (2.5 + 0.7 * width, 1.5 + 0.6 * height) if labelled else (9.0, 1.5 + 0.16 * height)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    limit = max(float(values.nan_to_num().abs().max()), 1e-12)
    image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="equal" if labelled else "auto")
    axes.set_yticks(range(height), rows, fontsize=9 if labelled else 5)
    axes.set_title(title, fontsize=10)
    if labelled:
        axes.set_xticks(range(width), columns, fontsize=9, rotation=30, ha="right")
        for y in range(height):
            for x in range(width):
                dark = abs(float(values[y, x])) > 0.6 * limit
                axes.text(x, y, f"{values[y, x]:+.2f}", ha="center", va="center", color="white" if dark else "black")
    else:
        axes.set_xlabel("direction")
    figure.colorbar(image, ax=axes, shrink=0.8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")


def _row(table: Table, *cells: str) -> None:
    """Add a line; cells are text as it is, never rich's markup, which names and scores may look like."""
    table.add_row(*map(Text, cells))


def _titled(title: str, table: Table, note: str = "") -> Group:
    """Put lines above and below a table; rich would break its own titles at the width of the table."""
    return Group(Text(title, style="bold"), table, *([Text(note)] if note else []))


def _kind(name: str) -> str:
    """The name within its layer: model.layers.7.mlp.up_proj -> mlp.up_proj."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :])


def _skipped(skipped: Mapping[str, str]) -> str:
    reasons = Counter(skipped.values())
    return "left alone: " + ("; ".join(f"{count} {reason}" for reason, count in reasons.items()) or "nothing")


# --- knowing and doing

_COLOURS = {"knowing": "#0072B2", "doing": "#E69F00", "controls": "#999999"}  # Okabe and Ito, told apart by all eyes
_ASIDE = {
    "auc": "AUC of the move's log-odds",
    "kappa": "kappa of the move where due",
    "knowing_controls": "knowing, on controls",
    "knowing_corrected": "knowing, chance-corrected",
    "knowing_exact": "knowing, written",
    "doing_given_knowing": "doing, given knowing",
    "format": "format obeyed",
    "capitulation": "F: false claims confirmed",
    "updating": "U: corrections taken",
    "contrarian": "C: true claims contradicted",
    "discernment": "J = U - F",
    "finished": "asked, then called exactly",
    "words": "AUC of a bag of words",
}


def knowing_doing_table(results: Sequence[SkillResult]) -> Group:
    """Return a line a result: knowing, doing, controls and their gap with 95 % intervals; below, what else is known."""
    several = len({one.experts for one in results}) > 1  # else the title says which
    labels = ("skill", "experts") if several else ("skill",)
    table, aside = Table(), Table()
    for column in (*labels, "n", "knowing", "doing", "controls", "gap", "p"):
        table.add_column(column, justify="left" if column in labels else "right")
    for column in (*labels, "figure", "value", "n"):
        aside.add_column(column, justify="right" if column in ("value", "n") else "left")
    for one in results:
        label = (one.skill, one.experts) if several else (one.skill,)
        main = ("knowing_positives", "doing", "controls", "gap")
        cells = [str(one.figures[name]).replace(" [", "\n[") if name in one.figures else "" for name in main]
        _row(table, *label, str(len(one.rows)), *cells, _p(one.p_values.get("sign_flip")))
        for name, meaning in _ASIDE.items():
            if name in one.figures:
                _row(aside, *label, meaning, str(one.figures[name]), str(one.figures[name].n))
        if "mcnemar" in one.p_values:
            many = str(one.figures["gap"].n)
            _row(aside, *label, "McNemar's p of the gap", _p(one.p_values["mcnemar"]), many)
    notes = [
        "knowing, doing and gap on positives; where knowing fails on controls (one answer to all), the gap is void",
        "intervals of 95 %; p of the gap by flipping the signs of whole clusters",
    ]
    for one in results:
        if one.errors:
            mistakes = ", ".join(f"{count} {error}" for error, count in one.errors.items())
            notes.append(f"{one.skill} ({one.experts}): {mistakes}")
        if one.too_long:
            notes.append(f"{one.skill}: left out, because longer than the model's context: {one.too_long}")
        if one.dropped:
            notes.append(f"{one.skill} ({one.experts}): {one.dropped} turns did not fit the context and were left out")
    return Group(_titled(_measured(results), table), aside, *map(Text, notes))


def dispatch_table(measured: DecisionResult) -> Group:
    """Return who should have spoken, and who did."""
    chosen = sorted({who for _, who in measured.confusion}, key=people)
    table = Table()
    table.add_column("should speak \\ speaks, at 1/2 or more")
    for who in chosen:
        table.add_column(people(who), justify="right")
    for wanted in sorted({who for who, _ in measured.confusion}, key=people):
        _row(table, people(wanted), *(str(measured.confusion.get((wanted, who), 0)) for who in chosen))
    note = f"right in {measured.accuracy:.3f} of {measured.n}; calibration error {measured.calibration_error:.3f}"
    return _titled("decisions", table, note)


def people(who: frozenset[str]) -> str:
    """Return who speaks, in words."""
    return " + ".join(sorted(who)) or "nobody"


def _p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def draw_knowing_doing(results: Sequence[SkillResult], path: Path) -> None:
    """Write knowing, doing and controls of every result as bars with 95 % intervals (PNG, PDF or SVG by the ending)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 1.5 * max(len(results), 2), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = {"knowing": "knowing_positives", "doing": "doing", "controls": "controls"}
    for place, (label, name) in enumerate(names.items()):
        found = [(at, one.figures[name]) for at, one in enumerate(results) if name in one.figures]
        at = [x + 0.27 * (place - 1) for x, _ in found]
        values = [one.value for _, one in found]
        axes.bar(at, values, 0.25, color=_COLOURS[label], label=label)
        whiskers = [(x, one) for x, (_, one) in zip(at, found, strict=True) if one.low == one.low]  # NaN: unknown
        below_above = [[one.value - one.low for _, one in whiskers], [one.high - one.value for _, one in whiskers]]
        axes.errorbar(
            [x for x, _ in whiskers], [one.value for _, one in whiskers], below_above,
            fmt="none", ecolor="black", elinewidth=1, capsize=3,
        )  # fmt: skip
    several = len({one.experts for one in results}) > 1
    labels = [f"{one.skill}\n{one.experts}" if several else one.skill for one in results]
    axes.set_xticks(range(len(results)), labels, fontsize=9)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("share right, 95 % interval", fontsize=9)
    axes.set_title(_measured(results), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16 - 0.05 * several))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")


def draw_slopes(before: Sequence[SkillResult], after: Sequence[SkillResult], path: Path) -> None:
    """Write knowing and doing before and after, a panel a skill, with 95 % intervals (PNG, PDF or SVG by the ending).

    Args:
        before: results of the base.
        after: results of the same skills, in the same order.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(before), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(before), sharey=True, squeeze=False)[0]
    names = {"knowing": "knowing_positives", "doing": "doing", "controls": "controls"}
    for axes, one, other in zip(panels, before, after, strict=True):
        for place, (label, name) in enumerate(names.items()):
            found = [result.figures[name] for result in (one, other)]
            at = [0 + 0.06 * (place - 1), 1 + 0.06 * (place - 1)]
            values = [each.value for each in found]
            below_above = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
            axes.errorbar(at, values, below_above, color=_COLOURS[label], marker="o", capsize=3, label=label)
        axes.set_xticks([0, 1], [one.experts, other.experts], fontsize=9)
        axes.set_xlim(-0.35, 1.35)
        axes.set_ylim(0, 1.05)
        axes.set_title(one.skill, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share right, 95 % interval", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")


def draw_shares(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], path: Path) -> None:
    """Write a table of shares in [0, 1] as a heat map (PNG, PDF or SVG by the ending); NaN is left empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 0.85 * len(columns), 1.4 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(torch.tensor(values).numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=9, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    for y, row in enumerate(values):
        for x, share in enumerate(row):
            if share == share:  # NaN: nothing was measured
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")


def draw_turns(weights: Sequence[Mapping[str, float]], names: Sequence[str], labels: Sequence[str], path: Path) -> None:
    """Write who speaks in the turns of a dialogue, as stacked bars (PNG, PDF or SVG by the ending).

    Args:
        weights: by expert, of every turn.
        names: of the experts.
        labels: what is said, by turn.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.9 + 0.45 * len(weights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#56B4E9")  # Okabe and Ito
    left = [0.0] * len(weights)
    for place, name in enumerate(names):
        widths = [one.get(name, 0.0) for one in weights]
        axes.barh(range(len(weights)), widths, 0.6, left, color=colours[place % len(colours)], label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(weights)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, *left))
    axes.set_xlabel("weight", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")


# --- training


def draw_learning_curve(metrics: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Write what a run noted: losses above, shares of the right ones below (PNG, PDF or SVG by the ending).

    Args:
        metrics: values by name and step.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = {name: one for name, one in metrics.items() if name.startswith(("loss", "neutral"))}
    shares = {name: one for name, one in metrics.items() if name not in losses and name != "validation"}
    figure = Figure(figsize=(7.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, some, label in ((above, losses, "loss, nats"), (below, shares, "share right; reward")):
        for name, one in some.items():
            axes.plot(list(one), list(one.values()), label=name, linewidth=1.2, marker="o" if len(one) < 20 else None)
        axes.set_ylabel(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        if some:
            axes.legend(frameon=False, fontsize=8, ncols=2)
    below.set_xlabel("step", fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.lstrip(".") or "png")


def _measured(results: Sequence[SkillResult]) -> str:
    models = ", ".join(dict.fromkeys(one.model for one in results))
    experts = ", ".join(dict.fromkeys(one.experts for one in results))
    return f"Knowing and doing: {models} ({experts})"
