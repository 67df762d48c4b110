"""Contact sheets: labelled pictures in rows on one canvas. Knows nothing of models or tasks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture = Image.Image | np.ndarray

PAPER, CARD, FRAME, INK, SOFT, ACCENT = "#f4f1ea", "#ffffff", "#d9d4c8", "#22262e", "#6c7280", "#3b5bdb"


@dataclass(frozen=True)
class Panel:
    """One picture with the words below it.

    Attributes:
        image: PIL picture or ``[H, W, 3]`` uint8 array, of any size; ``None`` for a panel of words only.
        label: A word or two in bold: what it is.
        text: One or more lines, each wrapped to the panel's width.
    """

    image: Picture | None
    label: str = ""
    text: str = ""


@dataclass(frozen=True)
class Row:
    """Panels side by side under a heading.

    Attributes:
        title: Heading.
        panels: From left to right; wrapped to further lines when there are more than fit.
        note: Small print beside the heading.
        groups: Sizes of runs of panels that belong together and are not torn apart by a line's end; each panel alone
            unless given.
    """

    title: str
    panels: tuple[Panel, ...]
    note: str = ""
    groups: tuple[int, ...] = ()

    def lines(self, columns: int) -> list[tuple[Panel, ...]]:
        """Panels line by line, at most ``columns`` each where groups allow."""
        lines: list[tuple[Panel, ...]] = [()]
        start = 0
        for size in self.groups or (1,) * len(self.panels):
            group = self.panels[start : start + size]
            if lines[-1] and len(lines[-1]) + size > columns:
                lines.append(())
            lines[-1] += group
            start += size
        return lines


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _as_image(picture: Picture) -> Image.Image:
    return (
        picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture, np.uint8))
    )


def enlarged(picture: Picture, side: int) -> Image.Image:
    """The picture with its longer side scaled to ``side`` pixels, smoothly."""
    image = _as_image(picture)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def contact_sheet(
    rows: Sequence[Row], title: str = "", subtitle: str = "", columns: int = 6, side: int = 160
) -> Image.Image:
    """Draw rows of panels below one another.

    Args:
        rows: What to show.
        title: Heading of the sheet.
        subtitle: Line under it.
        columns: Panels per line at most.
        side: Side of each picture in pixels.

    Returns:
        An RGB picture as large as it needs to be.
    """
    margin, gap, line = 28, 14, 15
    cell = side + gap
    width = 2 * margin + columns * cell - gap
    lines = [(row, panels, number == 0) for row in rows for number, panels in enumerate(row.lines(columns))]
    wrap = max(8, side // 6)
    heights = [_text_height(panels, wrap, line) for _, panels, _ in lines]
    head = (48 if title else 0) + (24 if subtitle else 0) + margin
    height = (
        head + sum(side + gap + (34 if first else 0) + extra for (_, _, first), extra in zip(lines, heights)) + margin
    )
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = margin
    if title:
        draw.text((margin, y), title, fill=INK, font=_font(30))
        y += 48
    if subtitle:
        draw.text((margin, y - 8), subtitle, fill=SOFT, font=_font(14))
        y += 24
    for (row, panels, first), extra in zip(lines, heights):
        if first:
            draw.text((margin, y), row.title, fill=ACCENT, font=_font(18))
            if row.note:
                offset = draw.textlength(row.title, font=_font(18)) + 12
                draw.text((margin + offset, y + 4), row.note, fill=SOFT, font=_font(13))
            y += 34
        for index, panel in enumerate(panels):
            _draw_panel(sheet, draw, panel, margin + index * cell, y, side, wrap, line)
        y += side + gap + extra
    return sheet


def _wrapped(text: str, wrap: int) -> list[str]:
    return [words for line in text.splitlines() for words in textwrap.wrap(line, wrap)]


def _text_height(panels: Sequence[Panel], wrap: int, line: int) -> int:
    below = [
        (18 if panel.label else 0) + line * len(_wrapped(panel.text, wrap))
        for panel in panels
        if panel.image is not None
    ]
    return max(below, default=0) + 10


def _draw_panel(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, x: int, y: int, side: int, wrap: int, line: int
) -> None:
    if panel.image is not None:
        picture = enlarged(panel.image, side)
        sheet.paste(picture, (x, y))
        draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
        y += side + 6
    else:
        draw.rounded_rectangle((x, y, x + side - 1, y + side - 1), 10, fill=CARD, outline=FRAME)
        x, y, wrap = x + 10, y + 8, wrap - 3
    if panel.label:
        draw.text((x, y), panel.label, fill=INK, font=_font(14))
        y += 18
    for words in _wrapped(panel.text, wrap):
        draw.text((x, y), words, fill=SOFT, font=_font(12))
        y += line
