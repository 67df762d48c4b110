"""A radar chart as SVG: one axis for each group, one outline for each series. Knows nothing of runs or judges."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

SIDE, MARGIN = 360, 100
"""Size of the drawing, and room around it for the groups' names, in pixels."""


def radar(
    series: Sequence[tuple[str, str, Mapping[str, float]]], groups: Sequence[str], best: float, title: str
) -> str:
    """The chart; empty with fewer than three groups, where there is no area to see.

    Args:
        series: Label, colour and value by group; a series that lacks a group has no outline, only points.
        groups: Names of the axes, clockwise from the top.
        best: Value at the rim; 0 is at the centre.
        title: What the values are.
    """
    if len(groups) < 3:
        return ""
    centre, reach = SIDE / 2 + MARGIN, SIDE / 2

    def point(index: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * index / len(groups)
        length = reach * min(max(value / best, 0.0), 1.0)
        return centre + length * math.sin(angle), centre - length * math.cos(angle)

    def path(values: Sequence[float]) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (point(i, v) for i, v in enumerate(values))) + "Z"

    whole = SIDE + 2 * MARGIN
    parts = [f'<svg class="radar" viewBox="0 0 {whole} {whole}" style="max-width:{whole}px" role="img">']
    parts.append(f"<title>{html.escape(title)}</title>")
    for ring in (0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(f'<path d="{path([ring * best] * len(groups))}" class="grid" fill="none"/>')
        parts.append(f'<text x="{centre + 3:.1f}" y="{centre - reach * ring + 11:.1f}">{ring * best:g}</text>')
    for index, group in enumerate(groups):
        x, y = point(index, best)
        parts.append(f'<path d="M{centre} {centre}L{x:.1f} {y:.1f}" class="grid"/>')
        side = x - centre
        anchor = "middle" if abs(side) < 1 else "start" if side > 0 else "end"
        away = 14 if y > centre + 1 else -6 if y < centre - 1 else 4
        place = x + (6 if side > 1 else -6 if side < -1 else 0)
        parts.append(f'<text x="{place:.1f}" y="{y + away:.1f}" text-anchor="{anchor}">{html.escape(group)}</text>')
    for label, colour, values in series:
        known = [(index, values[group]) for index, group in enumerate(groups) if group in values]
        if len(known) == len(groups):
            outline = path([value for _, value in known])
            parts.append(f'<path d="{outline}" fill="{colour}" fill-opacity=".12" stroke="{colour}" stroke-width="2"/>')
        for index, value in known:
            x, y = point(index, value)
            said = html.escape(f"{label}, {groups[index]}: {value:.2f}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{said}</title></circle>')
    return "".join(parts) + "</svg>"
