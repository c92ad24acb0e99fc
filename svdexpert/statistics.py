"""What the numbers of an evaluation are worth: intervals, paired tests, agreement. Values in, values out; no model.

    mean           sum_c S_c / sum_c m_c over clusters c; its interval resamples whole clusters (percentile bootstrap)
    paired gap     G = mean K - mean D = (b - c) / n; b knew and did not do, c did and did not know
    McNemar        binomial(b; b + c, 1/2), from b + c = 25 on chi2 = (|b - c| - 1)^2 / (b + c)
    AUC            P(positive > control) + P(equal) / 2
    kappa          (observed - expected agreement) / (1 - expected agreement)

Sources: Efron (1979) and Field and Welsh (2007) for the cluster bootstrap, Wilson (1927), McNemar (1947) with Edwards'
correction (1948), Mann and Whitney (1947), Cohen (1960), Holm (1979). Potemkin rate: Mancoridis et al. (2025).

A percentile interval of values that are all the same is a point, and that of a single cluster is unknown (NaN), since
nothing tells how clusters differ. `share_interval` falls back on Wilson's for shares of exactly 0 or 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from svdexpert.errors import MeasurementError

if TYPE_CHECKING:
    from svdexpert.skills import Case

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end; NaN where it is unknown.
        high: upper end; NaN where it is unknown.
        n: how many cases it comes from.
        p: of the hypothesis that the number is 0, where one was tested.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None

    def __str__(self) -> str:
        known = not math.isnan(self.low)
        return f"{self.value:.2f}" + (f" [{self.low:.2f}, {self.high:.2f}]" if known else "")


# --- resampling whole clusters


def mean_interval(
    values: ArrayLike, clusters: Sequence[Hashable] | None = None, *, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return a mean with the 2.5 and 97.5 % quantiles of the means of resampled clusters.

    Args:
        values: (n), finite.
        clusters: label of each value; every value its own cluster if None.
        resamples: how often as many clusters as there are get drawn, with replacement.
        seed: of the draws; the same seed and clusters give the same draws.

    Raises:
        MeasurementError: no values, NaN, or another number of clusters.
    """
    x = _numbers(values, "values")
    columns = np.stack([x, np.ones_like(x)], 1)
    return interval(columns, clusters, _ratio, n=len(x), resamples=resamples, seed=seed)


def share_interval(yes: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return a share with its clustered interval; where all cases agree, Wilson's with as many trials as clusters.

    Resampling cases that all agree gives an interval of no width, whatever their number.

    Args:
        yes: one a case.
        clusters: as in `mean_interval`.

    Raises:
        MeasurementError: as in `mean_interval`.
    """
    found = mean_interval([float(one) for one in yes], clusters)
    if found.value not in (0.0, 1.0):
        return found
    many = _indices(clusters, len(yes))[1]
    low, high = wilson(many if found.value else 0, many)
    return Estimate(found.value, low, high, found.n)


def difference_interval(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return mean(ours) - mean(theirs) of two sets of cases that may share clusters, such as J = U - F.

    Args:
        ours: (n), finite.
        theirs: (m), finite.
        clusters: the labels of both.
        resamples: as in `mean_interval`.
        seed: as in `mean_interval`.

    Raises:
        MeasurementError: as in `mean_interval`.
    """
    x, y = _numbers(ours, "values"), _numbers(theirs, "values")
    columns = np.zeros((len(x) + len(y), 4))
    columns[: len(x), 0], columns[: len(x), 1] = x, 1
    columns[len(x) :, 2], columns[len(x) :, 3] = y, 1
    labels = [*clusters[0], *clusters[1]]

    def apart(totals: Floats) -> Floats:
        return _ratio(totals[..., :2]) - _ratio(totals[..., 2:])

    return interval(columns, labels, apart, n=len(labels), resamples=resamples, seed=seed)


def interval(
    columns: Floats,
    clusters: Sequence[Hashable] | None,
    statistic: Callable[[Floats], Floats],
    *,
    n: int,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return any function of column sums with the interval that resampled clusters give it.

    Args:
        columns: what is summed, a row a case (n c).
        clusters: label of each case; every case its own cluster if None.
        statistic: totals (... c) to values (...); NaN where a resample does not determine it.
        n: how many cases the estimate says that it has.
        resamples: as in `mean_interval`.
        seed: as in `mean_interval`.

    Raises:
        MeasurementError: another number of clusters than rows.
    """
    sums = _by_cluster(columns, clusters)  # (clusters c)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(sums.sum(0)))
        if len(sums) < 2 or math.isnan(value):
            return Estimate(value, math.nan, math.nan, n)
        draws = np.concatenate([statistic(counts @ sums) for counts in _draws(len(sums), resamples, seed)])
    return Estimate(value, *_quantiles(draws), n)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each cluster was drawn, a row a resample, in pieces of bounded size."""
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, 4_000_000 // clusters))
    for start in range(0, resamples, rows):
        many = min(rows, resamples - start)
        drawn = rng.integers(clusters, size=(many, clusters)) + np.arange(many)[:, None] * clusters
        counts = np.bincount(drawn.ravel(), minlength=many * clusters)
        yield counts.reshape(many, clusters).astype(np.float64)


def _by_cluster(columns: Floats, clusters: Sequence[Hashable] | None) -> Floats:
    index, many = _indices(clusters, len(columns))
    sums = np.zeros((many, columns.shape[1]))
    np.add.at(sums, index, columns)
    return sums


def _indices(clusters: Sequence[Hashable] | None, n: int) -> tuple[NDArray[np.int64], int]:
    """Return the number of each case's cluster, and how many there are."""
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise MeasurementError(f"There are {n} values and {len(clusters)} clusters: give one label for each value.")
    places = {label: place for place, label in enumerate(dict.fromkeys(clusters))}
    return np.array([places[label] for label in clusters]), len(places)


def _quantiles(draws: Floats) -> tuple[float, float]:
    known = draws[~np.isnan(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _ratio(totals: Floats) -> Floats:
    return np.asarray(totals[..., 0] / totals[..., 1])


# --- shares and pairs


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Args:
        successes: 0 to n.
        n: trials, at least 1.

    Raises:
        MeasurementError: no trials, or more successes than trials.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= n or n < 1:
        raise MeasurementError(f"Found {successes} successes of {n} trials: expected 0 to n of at least one trial.")
    found = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(knowing: Sequence[bool], doing: Sequence[bool]) -> float:
    """Return the two-sided p of "as many know and do not do as do and do not know"; 1 where no case differs.

    Args:
        knowing: one a case.
        doing: of the same cases, in the same order.

    Raises:
        MeasurementError: no cases, or lists of different lengths.
    """
    from scipy.stats import binomtest, chi2

    _, b, c, _ = pairs(knowing, doing)
    if b + c == 0:
        return 1.0
    if b + c < 25:
        return float(binomtest(b, b + c, 0.5).pvalue)
    return float(chi2.sf((abs(b - c) - 1) ** 2 / (b + c), 1)) if b != c else 1.0


def pairs(knowing: Sequence[bool], doing: Sequence[bool]) -> tuple[int, int, int, int]:
    """Return how many cases are known and done (a), only known (b), only done (c), neither (d).

    Raises:
        MeasurementError: no cases, or lists of different lengths.
    """
    _same_length(knowing, doing)
    both = [(bool(k), bool(d)) for k, d in zip(knowing, doing, strict=True)]
    return both.count((True, True)), both.count((True, False)), both.count((False, True)), both.count((False, False))


def paired_gap(
    knowing: Sequence[bool],
    doing: Sequence[bool],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return G = mean K - mean D over the same cases, with a clustered interval and McNemar's p.

    McNemar's test takes cases as independent; `sign_flip` on K - D by cluster does not.

    Args:
        knowing: one a case.
        doing: of the same cases, in the same order.
        clusters: as in `mean_interval`.
        resamples: as in `mean_interval`.
        seed: as in `mean_interval`.

    Raises:
        MeasurementError: no cases, or lists of different lengths.
    """
    p = mcnemar(knowing, doing)
    deltas = [float(k) - float(d) for k, d in zip(knowing, doing, strict=True)]
    found = mean_interval(deltas, clusters, resamples=resamples, seed=seed)
    return Estimate(found.value, found.low, found.high, found.n, p)


def chance_corrected(accuracy: float, chance: float) -> float:
    """Return (accuracy - chance) / (1 - chance): 0 for guessing, 1 for always right, below 0 for worse than guessing.

    Args:
        accuracy: in [0, 1].
        chance: what guessing reaches, in [0, 1).

    Raises:
        MeasurementError: out of range.
    """
    if not 0 <= chance < 1 or not 0 <= accuracy <= 1:
        raise MeasurementError(f"accuracy {accuracy} must be in [0, 1] and chance {chance} in [0, 1).")
    return (accuracy - chance) / (1 - chance)


def doing_given_knowing(
    knowing: Sequence[bool], doing: Sequence[bool], clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """Return a / (a + b), the share of known cases that are done, with its interval: see `share_interval`.

    One minus it is the Potemkin rate: understood when asked, and not done.

    Args:
        knowing: one a case.
        doing: one a case.
        clusters: as in `mean_interval`.

    Raises:
        MeasurementError: nothing is known, no cases, or lists of different lengths.
    """
    a, b, _, _ = pairs(knowing, doing)
    if a + b == 0:
        raise MeasurementError("No case is known, so nothing can be said about doing what is known.")
    labels = list(range(len(knowing))) if clusters is None else clusters
    known = [(did, label) for knew, did, label in zip(knowing, doing, labels, strict=True) if knew]
    return share_interval([did for did, _ in known], [label for _, label in known])


def sign_flip(
    deltas: ArrayLike, clusters: Sequence[Hashable] | None = None, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Return the two-sided p of "differences are as often up as down", flipping the signs of whole clusters.

    All 2^c sign patterns are tried where they are no more than `resamples`; else random ones, where
    p = (1 + as extreme) / (1 + resamples).

    Args:
        deltas: (n), finite: ours - theirs of each case.
        clusters: as in `mean_interval`.
        resamples: patterns tried at most.
        seed: of the random ones.

    Raises:
        MeasurementError: as in `mean_interval`.
    """
    x = _numbers(deltas, "deltas")
    sums = _by_cluster(x[:, None], clusters)[:, 0]  # (clusters)
    observed, many = abs(sums.sum()), len(sums)
    if many < 60 and 2**many <= resamples:
        signs = 1.0 - 2.0 * (np.arange(2**many)[:, None] >> np.arange(many) & 1)
        return float((abs(signs @ sums) >= observed - 1e-9).mean())
    rng, extreme = np.random.default_rng(seed), 0
    rows = max(1, min(resamples, 4_000_000 // many))
    for start in range(0, resamples, rows):
        signs = 1.0 - 2.0 * rng.integers(2, size=(min(rows, resamples - start), many))
        extreme += int((abs(signs @ sums) >= observed - 1e-9).sum())
    return (1 + extreme) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's step-down rule, in the order given; at most 1.

    Args:
        p_values: each in [0, 1].

    Raises:
        MeasurementError: none, or out of range.
    """
    p = _numbers(p_values, "p values")
    if p.min() < 0 or p.max() > 1:
        raise MeasurementError(f"p values are in [0, 1]; found {p.min():g} to {p.max():g}.")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    corrected = np.empty_like(p)
    corrected[order] = steps.clip(max=1.0)
    return [float(one) for one in corrected]


# --- telling apart, agreeing


def auc(positives: ArrayLike, controls: ArrayLike) -> float:
    """Return the probability that a positive scores above a control, ties counted half: 0.5 tells nothing apart.

    Args:
        positives: scores (n), finite.
        controls: scores (m), finite.

    Raises:
        MeasurementError: one of them is empty, or holds NaN.
    """
    from scipy.stats import mannwhitneyu

    x, y = _numbers(positives, "positives"), _numbers(controls, "controls")
    return float(mannwhitneyu(x, y, method="asymptotic").statistic) / (len(x) * len(y))


def auc_interval(
    scores: ArrayLike,
    positive: Sequence[bool],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return the AUC of scores with the interval that resampled clusters give it.

    Args:
        scores: (n), finite.
        positive: of each score, whether it is that of a positive.
        clusters: as in `mean_interval`.
        resamples: as in `mean_interval`.
        seed: as in `mean_interval`.

    Raises:
        MeasurementError: no positive or no control, NaN, lists of different lengths.
    """
    x, labels = _numbers(scores, "scores"), np.asarray(positive, bool)
    _same_length(x, labels)
    value = auc(x[labels], x[~labels])
    index, many = _indices(clusters, len(x))
    if many < 2:
        return Estimate(value, math.nan, math.nan, len(x))
    wins = (np.sign(x[labels][:, None] - x[~labels][None]) + 1) / 2  # (positives controls)
    won, met = np.zeros((many, many)), np.zeros((many, many))
    cells = np.ix_(index[labels], index[~labels])
    np.add.at(won, cells, wins)
    np.add.at(met, cells, 1.0)
    with np.errstate(invalid="ignore"):
        found = [
            (counts @ won * counts).sum(1) / (counts @ met * counts).sum(1) for counts in _draws(many, resamples, seed)
        ]
    return Estimate(value, *_quantiles(np.concatenate(found)), len(x))


def kappa(ours: Sequence[bool], theirs: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Return Cohen's kappa of two judgements of the same cases: 1 agree, 0 as by chance; NaN where both are constant.

    Args:
        ours: one a case.
        theirs: of the same cases.
        clusters: as in `mean_interval`.

    Raises:
        MeasurementError: no cases, or lists of different lengths.
    """
    _same_length(ours, theirs)
    x, y = np.asarray(ours, bool), np.asarray(theirs, bool)
    cells = np.stack([x & y, x & ~y, ~x & y, ~x & ~y], 1).astype(np.float64)
    return interval(cells, clusters, _kappa, n=len(x))


def _kappa(totals: Floats) -> Floats:
    a, b, c, d = (totals[..., place] for place in range(4))
    n = a + b + c + d
    expected = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    return np.asarray(((a + d) / n - expected) / np.where(expected < 1, 1 - expected, np.nan))


def bag_of_words_auc(train_cases: Sequence[Case], test_cases: Sequence[Case], *, penalty: float = 1.0) -> float:
    """Return how well the words of the last user turn alone tell positives from controls, on cases not fitted.

    Logistic regression on the presence of words, L2 on all weights but the intercept (L-BFGS). Far from 0.5, a set can
    be solved by its surface.

    Args:
        train_cases: fitted; positives and controls.
        test_cases: scored; positives and controls.
        penalty: weight of half the squared norm, positive.

    Raises:
        MeasurementError: positives or controls are missing.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    for cases, name in ((train_cases, "train_cases"), (test_cases, "test_cases")):
        if {case.positive for case in cases} != {True, False}:
            raise MeasurementError(f"{name} needs positives and controls; found {len(cases)} cases of one kind.")
    bags, unseen = [_bag(case) for case in train_cases], [_bag(case) for case in test_cases]
    place = {word: number for number, word in enumerate(sorted(set().union(*bags)))}
    x = _presence(bags, place)
    y = np.array([case.positive for case in train_cases], np.float64)

    def loss(w: Floats) -> tuple[float, Floats]:
        z = x @ w[1:] + w[0]
        error = expit(z) - y
        value = float((np.logaddexp(0, z) - y * z).sum() + penalty / 2 * (w[1:] @ w[1:]))
        return value, np.concatenate([[error.sum()], x.T @ error + penalty * w[1:]])

    weights = minimize(loss, np.zeros(len(place) + 1), jac=True, method="L-BFGS-B").x
    scores = _presence(unseen, place) @ weights[1:]
    positive = np.array([case.positive for case in test_cases])
    return auc(scores[positive], scores[~positive])


def _bag(case: Case) -> set[str]:
    turns = [one for one in case.messages if one["role"] == "user"] or list(case.messages)
    return set(re.findall(r"\w+", str(turns[-1].get("content") or "").lower()))


def _presence(bags: Sequence[set[str]], place: dict[str, int]) -> Floats:
    x = np.zeros((len(bags), len(place)))
    for row, bag in enumerate(bags):
        x[row, [place[word] for word in bag if word in place]] = 1
    return x


# --- checks


def _numbers(values: ArrayLike, name: str) -> Floats:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise MeasurementError(f"There are no {name}: expected a list of at least one number, found shape {x.shape}.")
    if not np.isfinite(x).all():
        raise MeasurementError(f"{int((~np.isfinite(x)).sum())} of {len(x)} {name} are NaN or infinite.")
    return x


def _same_length(ours: Any, theirs: Any) -> None:
    if len(ours) != len(theirs) or not len(ours):
        raise MeasurementError(
            f"Found {len(ours)} and {len(theirs)} judgements: expected as many of both, and at least one."
        )
