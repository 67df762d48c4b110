"""Contact sheets: what belongs together stays together, everything is drawn, sizes follow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from unialignment.evaluation.sheet import Panel, Row, contact_sheet, enlarged

RED = np.full((64, 64, 3), (255, 0, 0), np.uint8)


def test_groups_are_not_torn_apart() -> None:
    row = Row("t", tuple(Panel(RED, str(i)) for i in range(7)), groups=(3, 2, 2))
    assert [[panel.label for panel in line] for line in row.lines(4)] == [["0", "1", "2"], ["3", "4", "5", "6"]]
    wide = Row("t", tuple(Panel(RED) for _ in range(6)), groups=(6,))
    assert [len(line) for line in wide.lines(4)] == [6]


def test_every_picture_is_on_the_sheet() -> None:
    sheet = contact_sheet([Row("row", tuple(Panel(RED) for _ in range(3)))], columns=2, side=50)
    red = (np.asarray(sheet) == (255, 0, 0)).all(axis=-1)
    assert red.sum() == 3 * 50 * 50


def test_long_texts_make_room() -> None:
    short = contact_sheet([Row("row", (Panel(RED, "a", "few words"),))])
    long = contact_sheet([Row("row", (Panel(RED, "a", "many words " * 20),))])
    assert long.height > short.height
    assert long.width == short.width


def test_pictures_keep_their_shape() -> None:
    assert enlarged(Image.new("L", (20, 10)), 100).size == (100, 50)
