"""The claims of the CoTo paper, and how the study's measures decide them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.report import markdown

Rows = Sequence[dict[str, Any]]

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable here"
CONFIDENCE = 0.95
LEAST = 3
CURVES = ("sweep", "fused", "dropped", "shapley")


@dataclass(frozen=True)
class Claim:
    """Compares one measure of `method` and `baseline` on the same seeds; `sign` is 1 if larger is better, else -1.

    Attributes:
        says: the claim in words.
        measure, at: the rows that decide it.
        paper: the paper's own figures, "without → with".
    """

    says: str
    measure: str
    at: str | float | None = None
    method: str = "CoTo"
    baseline: str = "LoRA"
    sign: int = 1
    paper: str = ""
    settings: tuple[str, ...] = ("digits", "text", "sentiment", "news")


SEVERAL = ("text", "sentiment")  # settings of several tasks
PAPERS = (
    Claim("the score on a single task is higher", "score", paper="ViT 82.95 → 83.48; commonsense 80.79 → 85.02"),
    Claim("two seeds fused 1:1 score higher", "fused", 0.5, paper="commonsense 39 → 79"),
    Claim("three seeds fused 1:1:1 score higher", "fused, seeds", 3),
    Claim("the barrier between two seeds is lower", "barrier", sign=-1),
    Claim("several tasks fused by factors score higher", "merged", "fuse", paper="47.2 → 58.5", settings=SEVERAL),
    Claim("… merged by LoRA-LEGO", "merged", "lego", paper="62.2 → 67.2", settings=SEVERAL),
    Claim("… as an ensemble of outputs", "merged", "ensemble", paper="56.8 → 56.7", settings=SEVERAL),
    Claim("the score with every other layer pruned is higher", "kept", "every-other", paper="77.0 → 81.3"),
    Claim("… with only the low third of the layers", "kept", "low", paper="72.0 → 75.9"),
    Claim("… with only the middle third", "kept", "middle", paper="71.0 → 76.8"),
    Claim("… with only the high third", "kept", "high", paper="73.2 → 78.4"),
    Claim("… with half of the entries pruned", "sparsity", 0.5, paper="about +10 points"),
    Claim("… with random layers dropped", "dropped, mean", paper="theorem 3.1"),
    Claim("… with half of the layers dropped", "dropped, half", settings=("sentiment", "news")),
    Claim("layers contribute more evenly (spread of Shapley values)", "imbalance", sign=-1),
    Claim("training takes less time", "time", sign=-1, paper="-7.2 %"),
    Claim("a rising p scores higher than a constant p", "score", baseline="LoRA, constant p", paper="71.4 → 72.7"),
    Claim("… two seeds fused", "fused", 0.5, baseline="LoRA, constant p", paper="68.9 → 72.0"),
    Claim("… every other layer pruned", "kept", "every-other", baseline="LoRA, constant p", paper="70.1 → 71.1"),
    Claim("an exponential ramp fuses better than a linear", "fused", 0.5, "CoTo, exponential", "CoTo", paper="+0.5"),
    Claim("… and prunes better", "kept", "every-other", "CoTo, exponential", "CoTo", paper="+1.7"),
    Claim("DoRA scores higher with CoTo", "score", None, "DoRA, CoTo", "DoRA", 1, "83.45 → 83.93"),
    Claim("HiRA scores higher with CoTo", "score", None, "HiRA, CoTo", "HiRA", 1, "83.98 → 84.34"),
    Claim("DoRA trains faster with CoTo", "time", None, "DoRA, CoTo", "DoRA", -1, "-23.7 %"),
    Claim("HiRA trains faster with CoTo", "time", None, "HiRA, CoTo", "HiRA", -1, "-24.2 %"),
    Claim("our LoRA takes less time than PEFT's", "time", None, "LoRA", "PEFT's LoRA", -1),
)
# claims about CoTo with the settings that the screen chose; other settings have no such rows
CHOSEN = (
    *(replace(claim, method="CoTo, chosen") for claim in PAPERS if claim.method == "CoTo"),
    Claim("the chosen settings score higher than the paper's", "score", None, "CoTo, chosen", "CoTo"),
    Claim("… two seeds fused", "fused", 0.5, "CoTo, chosen", "CoTo"),
    Claim("… random layers dropped", "dropped, mean", None, "CoTo, chosen", "CoTo"),
)
CLAIMS = PAPERS + CHOSEN


def values(rows: Rows, setting: str, method: str, measure: str, at: str | float | None = None) -> dict[int, float]:
    """The mean over the domains for each seed; skips rows without a number, such as a spread over a mean of 0."""
    found: dict[int, list[float]] = {}
    for row in rows:
        place = (row["setting"], row["method"], row["measure"], row["at"])
        if place == (setting, method, measure, at) and row["value"] is not None:
            found.setdefault(row["seed"], []).append(row["value"])
    return {seed: statistics.fmean(parts) for seed, parts in found.items()}


def pairs(rows: Rows, setting: str, claim: Claim) -> dict[int, tuple[float, float]]:
    """(baseline, method) values for each seed, averaged over the domains in which both have one."""
    found: dict[int, list[tuple[float, float]]] = {}
    for domain in dict.fromkeys(row["domain"] for row in rows):
        own = [row for row in rows if row["domain"] == domain]
        ours = values(own, setting, claim.method, claim.measure, claim.at)
        others = values(own, setting, claim.baseline, claim.measure, claim.at)
        for seed in sorted(ours.keys() & others.keys()):
            found.setdefault(seed, []).append((others[seed], ours[seed]))
    return {seed: tuple(map(statistics.fmean, zip(*both, strict=True))) for seed, both in sorted(found.items())}


def mean_sd(found: dict[int, float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    numbers = list(found.values())
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean by Student's t; infinite if there is only one number."""
    from scipy.stats import t

    middle = statistics.fmean(differences)
    if len(differences) < 2:
        return -math.inf, math.inf
    half = (
        t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    )
    return middle - half, middle + half


def verdict(differences: Sequence[float], sign: int) -> str:
    """Whether the interval of the paired differences lies on the claimed side, on the other side, or on both.

    Fewer than `LEAST` pairs decide nothing: scores that count right answers are discrete, and a few equal differences
    would give an interval of zero width.
    """
    if len(differences) < LEAST:
        return OPEN
    low, high = sorted(sign * end for end in interval(differences))
    return HOLDS if low > 0 else FAILS if high < 0 else OPEN


def judged(rows: Rows, setting: str) -> list[dict[str, Any]]:
    """Every claim for which the setting has rows, with both means, the paired difference and the verdict."""
    found = []
    for claim in CLAIMS:
        both = pairs(rows, setting, claim)
        if setting not in claim.settings or not both:
            continue
        others, ours = ({seed: values[i] for seed, values in both.items()} for i in (0, 1))
        differences = [ours[seed] - others[seed] for seed in both]
        low, high = interval(differences)
        found.append({
            "claim": claim, "without": mean_sd(others), "with": mean_sd(ours),
            "difference": statistics.fmean(differences), "low": low, "high": high,
            "verdict": verdict(differences, claim.sign), "seeds": len(both),
        })  # fmt: skip
    return found


def shown(found: tuple[float, float]) -> str:
    """``mean ± sd``."""
    digits = 1 if abs(found[0]) >= 10 else 3
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def table(rows: Rows, setting: str) -> str:
    """The claims and their verdicts, in Markdown."""
    lines = []
    for found in judged(rows, setting):
        claim, digits = found["claim"], 2 if abs(found["difference"]) >= 1 else 3
        span = f"{found['difference']:+.{digits}f} ({found['low']:+.{digits}f} to {found['high']:+.{digits}f})"
        beside = f"{claim.method} / {claim.baseline}"
        told = [shown(found["without"]), shown(found["with"]), span, str(found["seeds"]), found["verdict"]]
        lines.append([claim.says, beside, claim.paper, *told])
    titles = ["claim", "with / without", "paper", "without", "with", "difference (95 %)", "pairs", "verdict"]
    return markdown(titles, lines) + f"\n\n{len(lines)} comparisons; the intervals are not corrected for their number."


def overview(rows: Rows, setting: str) -> str:
    """A Markdown table of every measure of every method except long curves."""
    rows = [row for row in rows if row["measure"] != "screen"]
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "base"]
    lines = [["learning rate chosen", *(chosen_rate(rows, setting, method) for method in methods)]]
    base = values(rows, setting, "base", "score")
    places = dict.fromkeys((row["measure"], row["at"]) for row in rows)
    # curves are shown in the pictures
    for measure, at in (place for place in places if place[0] not in CURVES or place == ("fused", 0.5)):
        cells = []
        for method in methods:
            found = values(rows, setting, method, measure, at)
            cells.append(shown(mean_sd(found)) if found else "")
        lines.append([f"{measure}{'' if at is None else f' {at}'}", *cells])
    domains = list(dict.fromkeys(row["domain"] for row in rows if row["measure"] == "score"))
    for domain in domains if len(domains) > 1 else ():
        own = [row for row in rows if row["domain"] == domain]
        found = [values(own, setting, method, "score") for method in methods]
        lines.append([f"score of {domain}", *(shown(mean_sd(scores)) if scores else "" for scores in found)])
    lines.append(["score of the base", *[f"{statistics.fmean(base.values()):.3g}"] * len(methods)])
    return markdown(["measure", *methods], [line for line in lines if any(line[1:])])


def chosen_rate(rows: Rows, setting: str, method: str) -> str:
    """The best learning rate of the sweep; empty without a sweep."""
    rates = rates_of(rows, method)
    scores = {at: statistics.fmean(values(rows, setting, method, "sweep", at).values()) for at in rates}
    if not scores:
        return ""
    best = max(scores, key=lambda at: scores[at])
    return f"{best:g}{' (edge)' if best in (min(rates), max(rates)) else ''}"


def screened(rows: Rows) -> str:
    """A Markdown table of the screen's recipes and their validation scores, best first."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["measure"] == "screen":
            found.setdefault(row["method"], {})[row["seed"]] = row["value"]
    order = sorted(found, key=lambda recipe: -mean_sd(found[recipe])[0])
    lines = [[*recipe.split(" @ "), shown(mean_sd(found[recipe]))] for recipe in order]
    return markdown(["CoTo", "learning rate", "schedule", "validation"], lines)


def rates_of(rows: Rows, method: str) -> list[float]:
    """The learning rates that were tried."""
    return list(dict.fromkeys(row["at"] for row in rows if row["measure"] == "sweep" and row["method"] == method))
