"""The study's pictures, one file per subject with a panel for each setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import figure
from benchmarks.study.claims import Rows, mean_sd, values
from benchmarks.study.runs import METHODS
from cotolora.results import save_picture

# (file, title, measure, x label, logarithmic)
CURVES = (
    ("fused", "two seeds' factors fused", "fused", "weight λ of the first seed", False),
    ("sparsity", "entries of A and B zeroed by magnitude", "sparsity", "share of zeros", False),
    ("dropped", "random layers' adapters dropped", "dropped", "layers dropped", False),
    ("shapley", "Shapley value of each layer", "shapley", "layer", False),
    ("rates", "sensitivity to the learning rate (validation)", "sweep", "learning rate", True),
)
# (file, title, measure, unit if it differs from the setting's)
POINTS = (
    ("score", "one task, all layers", "score", ""),
    ("kept", "layers kept", "kept", ""),
    ("merged", "tasks merged by", "merged", ""),
    ("time", "training time", "time", "relative to LoRA"),
    ("skipped", "adapter work skipped", "skipped", "% of the multiplications"),
)


def draw(rows: Rows, units: dict[str, str], folder: Path) -> list[Path]:
    """Writes every picture for which there are rows."""
    import matplotlib

    matplotlib.use("Agg")
    settings = [name for name in units if any(row["setting"] == name for row in rows)]
    made = []
    for name, title, measure, label, logarithmic in CURVES:
        shown = [setting for setting in settings if places_of(rows, setting, measure)]
        if not shown:
            continue
        canvas, axes = figure(len(shown), width=5.6, height=4.0)
        for axis, setting in zip(axes, shown, strict=True):
            curves(axis, rows, setting, measure)
            axis.set(title=f"{setting}: {title}", xlabel=label, ylabel=units[setting])
            if logarithmic:
                axis.set_xscale("log", base=2)
        made.append(save(canvas, axes, folder / f"{name}.png"))
    for name, title, measure, unit in POINTS:
        shown = [setting for setting in settings if places_of(rows, setting, measure)]
        if not shown:
            continue
        canvas, axes = figure(len(shown), width=6.4, height=4.0)
        for axis, setting in zip(axes, shown, strict=True):
            points(axis, rows, setting, measure)
            axis.set(title=f"{setting}: {title}", ylabel=unit or units[setting])
        made.append(save(canvas, axes, folder / f"{name}.png"))
    return made


def save(canvas: Any, axes: list[Any], path: Path) -> Path:
    """Writes a picture with one legend for all its panels."""
    from matplotlib import pyplot

    labelled = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    canvas.legend(labelled.values(), labelled, loc="outside lower center", ncols=4, fontsize="small")
    save_picture(canvas, path, dpi=110)
    pyplot.close(canvas)
    return path


def color_of(method: str) -> str:
    """A method's colour, the same in every picture."""
    names = list(dict.fromkeys([*(known.name for known in METHODS), "CoTo, chosen", "PEFT's LoRA"]))
    return f"C{names.index(method)}"


def methods_of(rows: Rows, setting: str, measure: str) -> list[str]:
    """The methods that have a measure, in order of their first row, without the base."""
    return [
        method
        for method in dict.fromkeys(r["method"] for r in rows if (r["setting"], r["measure"]) == (setting, measure))
        if method != "base"
    ]


def places_of(rows: Rows, setting: str, measure: str) -> list[Any]:
    """The values of "at" for a measure, in order of their first row."""
    return list(dict.fromkeys(r["at"] for r in rows if (r["setting"], r["measure"]) == (setting, measure)))


def curves(axis: Any, rows: Rows, setting: str, measure: str) -> None:
    """Draws mean and standard deviation over the seeds as a curve for each method."""
    places = places_of(rows, setting, measure)
    for method in methods_of(rows, setting, measure):
        middle, spread = zip(*(mean_sd(values(rows, setting, method, measure, at)) for at in places), strict=True)
        (line,) = axis.plot(places, middle, marker="o", markersize=3, label=method, color=color_of(method))
        low = [m - s for m, s in zip(middle, spread, strict=True)]
        high = [m + s for m, s in zip(middle, spread, strict=True)]
        axis.fill_between(places, low, high, color=line.get_color(), alpha=0.15)


def points(axis: Any, rows: Rows, setting: str, measure: str) -> None:
    """Draws mean and standard deviation over the seeds as a group of points for each value of "at"."""
    methods, places = methods_of(rows, setting, measure), places_of(rows, setting, measure)
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        where = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(places))]
        middle, spread = zip(*(mean_sd(values(rows, setting, method, measure, at)) for at in places), strict=True)
        axis.errorbar(where, middle, spread, fmt="o", label=method, color=color_of(method))
    names = ["" if place is None else str(place) for place in places]
    axis.set_xticks(range(len(places)), names, rotation=20, ha="right", fontsize="small")
    axis.grid(axis="y", color="0.9")
