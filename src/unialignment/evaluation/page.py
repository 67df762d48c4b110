"""Pieces of a report's page: the page itself, tables, bars, pictures, a gallery that can be sorted.

A page holds its pictures and a short script of its own and asks nothing of any network. Texts are escaped in here;
only what is called a body or a cell is HTML. Knows nothing of what is shown.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unialignment.errors import InputError
from unialignment.images import load_image
from unialignment.storage import atomic_file

THUMBNAIL = 160
"""Longest side of the page's pictures, in pixels."""
GALLERY = 12
"""Worst and best items that are shown, of each run and group."""
COLOURS = ("#3b5bdb", "#e8590c", "#2f9e44", "#ae3ec9", "#c92a2a", "#0c8599", "#f08c00", "#495057")


@dataclass(frozen=True)
class Card:
    """One item of a gallery.

    Attributes:
        id: Its name.
        group: What it is filtered by.
        text: What was asked.
        score: What it is sorted by; below 0 where there is none.
        figures: Its pictures, made by :func:`figure`.
    """

    id: str
    group: str
    text: str
    score: float
    figures: Sequence[str]


def write(path: Path, title: str, parts: Iterable[str]) -> Path:
    """Write a page of parts in HTML.

    Raises:
        StorageError: It can't be written.
    """
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<main><h1>{html.escape(title)}</h1>{''.join(parts)}</main><script>{_SCRIPT}</script></html>\n"
    )
    with atomic_file(path) as file:
        file.write(page.encode())
    return path


def introduction(label: str, identity: str, notes: Sequence[str]) -> str:
    """What a run is, and what has to be known before its figures are read."""
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<p><b>{html.escape(label)}</b> <code>{html.escape(identity)}</code></p><ul>{lines}</ul>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that is sorted by clicking on its head; cells are HTML."""
    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    note = f"<p>{html.escape(caption)}</p>" if caption else ""
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody>'
        f"</table></div>{note}"
    )


def bars(
    series: Sequence[tuple[str, Mapping[str, Sequence[float]]]], groups: Sequence[str], best: float, title: str
) -> str:
    """Bars with interval whiskers, one colour for each series.

    Args:
        series: Label, and value, low and high end by group.
        groups: Names below the bars.
        best: Value at the top.
        title: What the values are.
    """
    bar, gap, height, left = 18, 26, 220, 34
    longest = max((len(group) for group in groups), default=0)
    step = max(96, 7 * longest, bar * len(series) + gap)  # a group's name has to fit under its bars
    width = left + step * len(groups)
    parts = [f'<svg viewBox="0 0 {width} {height + 50}" style="max-width:{max(width, 480)}px" role="img">']
    parts.append(f"<title>{html.escape(title)} with 95 % intervals</title>")
    for tick in range(0, 11, 2):
        y = 10 + height * (1 - tick / 10)
        value = f"{tick * best / 10:.3g}"
        parts.append(f'<path d="M{left} {y:.1f}H{width}" class="grid"/><text x="4" y="{y + 4:.1f}">{value}</text>')
    for place, group in enumerate(groups):
        start = left + place * step + gap / 2
        for index, (name, values) in enumerate(series):
            found = values.get(group)
            if found is None:
                continue
            top, low, high = (10 + height * (1 - min(max(value / best, 0.0), 1.0)) for value in found)
            x = start + index * bar
            label = html.escape(f"{name}, {group}: {found[0]:.2f}")
            colour = COLOURS[index % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar - 3}" height="{10 + height - top:.1f}" fill="{colour}">'
                f"<title>{label}</title></rect>"
                f'<path class="whisker" d="M{x + (bar - 3) / 2:.1f} {low:.1f}V{high:.1f}"/>'
            )
        parts.append(f'<text x="{start:.1f}" y="{height + 30}">{html.escape(group)}</text>')
    keys = [
        f'<span><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{html.escape(name)}</span>'
        for n, (name, _) in enumerate(series)
    ]
    return "".join(parts) + f'</svg><p class="keys">{"".join(keys)}</p>'


def extremes(ids: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    """The worst and the best of some items, half of :data:`GALLERY` each; those without a score are left out."""
    ranked = sorted((one for one in ids if one in scores), key=lambda one: scores[one])
    return [*ranked[: GALLERY // 2], *ranked[-(GALLERY // 2) :]]


def gallery(cards: Sequence[Card], groups: Sequence[str], caption: str) -> str:
    """Cards, sorted by score or name and filtered by group."""
    choices = "".join(f'<option value="{html.escape(group)}">{html.escape(group)}</option>' for group in groups)
    shown = [
        f'<article data-group="{html.escape(card.group)}" data-score="{card.score:.4f}" '
        f'data-id="{html.escape(card.id)}"><h3>{html.escape(card.id)}</h3><p>{html.escape(card.text)}</p>'
        f"<div>{''.join(card.figures)}</div></article>"
        for card in cards
    ]
    return (
        f"<p>{html.escape(caption)}</p>"
        '<p><select id="order"><option value="worst">worst first</option><option value="best">best first</option>'
        '<option value="id">by name</option></select> '
        f'<select id="group"><option value="">all groups</option>{choices}</select></p>'
        f'<div id="gallery">{"".join(shown)}</div>'
    )


def figure(picture: Path | bytes | np.ndarray | None, label: str, body: str = "") -> str:
    """A picture with its name and, below it, a body in HTML; without a picture it says so."""
    name = html.escape(label)
    shown = "<em>no picture</em>" if picture is None else f'<img alt="{name}" src="{_data_uri(picture)}">'
    return f"<figure>{shown}<figcaption><b>{name}</b>{body}</figcaption></figure>"


def statement(label: str, body: str) -> str:
    """What stands where a picture would: a text with its name."""
    return f"<figure><figcaption><b>{html.escape(label)}</b>{html.escape(body)}</figcaption></figure>"


def _data_uri(picture: Path | bytes | np.ndarray) -> str:
    try:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else load_image(picture)
    except InputError:
        image = Image.new("RGB", (8, 8), "gray")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
code, pre { font-size: .8rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { cursor: pointer; text-align: left; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #8884; white-space: nowrap; }
svg { width: 100%; display: block; }
svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: #8885; } .whisker { stroke: currentColor; stroke-width: 1.5; }
.keys span { margin-right: 1.2rem; } .keys i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
article { border-top: 1px solid #8884; padding: .5rem 0 1rem; }
article h3 { margin: .2rem 0; font-size: 1rem; } article > p { margin: 0 0 .6rem; max-width: 60rem; }
article > div { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; width: 180px; }
figure img { max-width: 100%; min-width: 128px; image-rendering: pixelated; display: block; }
figcaption { font-size: .8rem; } figcaption b { display: block; }
"""

_SCRIPT = """
const gallery = document.getElementById('gallery'), order = document.getElementById('order');
const group = document.getElementById('group');
function arrange() {
  const cards = [...gallery.children];
  const score = card => Number(card.dataset.score);
  const orders = { worst: (a, b) => score(a) - score(b), best: (a, b) => score(b) - score(a),
    id: (a, b) => a.dataset.id.localeCompare(b.dataset.id, undefined, { numeric: true }) };
  cards.sort(orders[order.value]).forEach(card => {
    card.hidden = group.value !== '' && card.dataset.group !== group.value;
    gallery.append(card);
  });
}
order.onchange = group.onchange = arrange;
arrange();
document.querySelectorAll('table.sortable th').forEach((head, column) => head.onclick = () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up !== '1';
  head.dataset.up = up ? '1' : '0';
  const text = row => row.cells[column].innerText;
  [...body.rows].sort((a, b) => text(a).localeCompare(text(b), undefined, { numeric: true }) * (up ? 1 : -1))
    .forEach(row => body.append(row));
});
"""
