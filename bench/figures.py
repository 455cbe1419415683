"""Plots of what benchmarks found, as PNG: bars by workload, and curves over one size of a problem."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fomaml_fused.train.files import save_figure

HIGHLIGHTED = ("#c1121f", "#f48c06", "#ffd166")
# Of peers: cool and pale, so that ours stand out.
PALE = ("#7d8597", "#8ecae6", "#588157", "#b5838d", "#6d6875", "#4f86a6", "#d4b483", "#adb5bd")


def colours(names: Sequence[str], highlighted: Sequence[str]) -> dict[str, str]:
    """A colour for each name."""
    others = [name for name in names if name not in highlighted]
    found = dict(zip(highlighted, HIGHLIGHTED, strict=False))
    return found | {name: PALE[i % len(PALE)] for i, name in enumerate(others)}


def draw_bars(
    path: Path,
    seconds: Mapping[str, Mapping[str, Mapping[str, float]]],
    names: Sequence[str],
    highlighted: Sequence[str],
    *,
    beneath: Mapping[str, str],
    title: str,
    notes: Sequence[str],
) -> None:
    """Bars of medians in ms on a logarithmic axis, with whiskers from quartile to quartile.

    Args:
        seconds: median, q1 and q3 by group and name.
        names: of the bars of a group, in their order.
        beneath: what stands below the name of each group.
        notes: sentences below the plot.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        width = 0.86 / max(1, len(names))
        colour = colours(names, highlighted)
        for i, name in enumerate(names):
            there = [(g, found[name]) for g, found in enumerate(seconds.values()) if name in found]
            if not there:
                continue
            middles = [1e3 * found["median"] for _, found in there]
            whiskers = [
                [1e3 * (found["median"] - found["q1"]) for _, found in there],
                [1e3 * (found["q3"] - found["median"]) for _, found in there],
            ]
            axes.bar(
                [g + (i - (len(names) - 1) / 2) * width for g, _ in there],
                middles,
                width,
                yerr=whiskers,
                color=colour[name],
                edgecolor="black" if name in highlighted else "none",
                linewidth=0.6,
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
                label=name,
                zorder=2,
            )
        axes.set_yscale("log")
        axes.set_ylabel("one meta-step, ms")
        axes.set_xticks(range(len(seconds)), [f"{group}\n{beneath.get(group, '')}" for group in seconds])
        axes.grid(axis="y", alpha=0.3, zorder=0)
        axes.set_title(title, fontsize=10, loc="left")
        if names:
            figure.legend(loc="outside upper center", ncols=min(5, len(names)), fontsize=8, frameon=False)
        if notes:
            lines = [line for note in notes for line in textwrap.wrap(note, 170)]
            figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7)

    save_figure(path, draw, (12.0, 6.0))


@dataclass(frozen=True)
class Curve:
    """A line of a panel.

    Attributes:
        xs, ys: points; those of y that are not positive are not drawn.
        kinds: of each point, which gives its marker; an empty one for a dot.
        hollow: the markers that are drawn as outlines.
    """

    label: str
    colour: str
    xs: Sequence[float]
    ys: Sequence[float]
    kinds: Sequence[str]
    hollow: Sequence[bool]
    bold: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot of curves on logarithmic axes."""

    x: str
    y: str
    curves: Sequence[Curve]


MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def draw_panels(path: Path, panels: Sequence[Panel], title: str, legend: str) -> None:
    """Panels side by side, two in a row; the kinds of points have markers that all panels share, under a legend."""
    kinds = list(dict.fromkeys(k for panel in panels for curve in panel.curves for k in curve.kinds if k))
    marker = {kind: MARKERS[i % len(MARKERS)] for i, kind in enumerate(kinds)}

    def draw(figure: Any) -> None:
        grid = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False).flat
        for axes, panel in zip(grid, panels, strict=False):
            for curve in panel.curves:
                rows = zip(curve.xs, curve.ys, curve.kinds, curve.hollow, strict=True)
                points = [row for row in rows if row[1] > 0]
                xs, ys = [row[0] for row in points], [row[1] for row in points]
                weight, order = (2.2, 3) if curve.bold else (1.2, 2)
                axes.plot(xs, ys, color=curve.colour, linewidth=weight, label=curve.label, zorder=order)
                for x, y, kind, hollow in points:
                    shape, size = (marker[kind], 34) if kind else ("o", 8)
                    face = "white" if hollow else curve.colour
                    axes.scatter([x], [y], marker=shape, s=size, c=face, edgecolors=curve.colour, zorder=order + 1)
            axes.set(xscale="log", yscale="log", xlabel=panel.x, ylabel=panel.y)
            axes.grid(alpha=0.3)
            if panel.curves:
                axes.legend(fontsize=7)
        for axes in list(grid)[len(panels) :]:
            axes.set_visible(False)
        for kind, shape in marker.items():
            figure.axes[0].scatter([], [], marker=shape, color="#444444", label=kind)
        if marker:
            handles = figure.axes[0].get_legend_handles_labels()
            chosen = [(h, label) for h, label in zip(*handles, strict=True) if label in marker]
            figure.legend(
                *zip(*chosen, strict=True),
                loc="outside lower center",
                ncols=3,
                fontsize=8,
                title=legend,
                title_fontsize=8,
            )
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")

    rows = math.ceil(len(panels) / 2)
    save_figure(path, draw, (11.0, 1.0 + 3.8 * rows))
