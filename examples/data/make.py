"""Draws the example data sets of this folder: plain shapes on plain grounds, one folder and manifest per kind of data.

Run it from anywhere: ``python examples/data/make.py [FOLDER]``. The same files come out every time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 50, 40), "green": (60, 160, 70), "blue": (50, 90, 210), "yellow": (235, 200, 50)}
GROUNDS = {"white": (245, 245, 245), "grey": (170, 170, 170)}
SHAPES = ("circle", "square", "triangle")


def paint(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> None:
    """One shape that fills its box."""
    left, top, right, bottom = box
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=colour)


def picture(shape: str, colour: str, ground: str = "white", size: tuple[int, int] = (48, 48)) -> Image.Image:
    """A shape in the middle of a ground."""
    image = Image.new("RGB", size, GROUNDS[ground])
    side = min(size) // 2
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    paint(ImageDraw.Draw(image), shape, COLOURS[colour], (left, top, left + side, top + side))
    return image


def mask(shape: str, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """White where the shape is."""
    image = Image.new("RGB", size, (0, 0, 0))
    side = min(size) // 2
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    paint(ImageDraw.Draw(image), shape, (255, 255, 255), (left, top, left + side, top + side))
    return image


def pair(first: tuple[str, str], second: tuple[str, str]) -> Image.Image:
    """Two shapes side by side."""
    image = Image.new("RGB", (48, 48), GROUNDS["white"])
    for (shape, colour), left in ((first, 4), (second, 26)):
        paint(ImageDraw.Draw(image), shape, COLOURS[colour], (left, 15, left + 18, 33))
    return image


class Kind:
    """One folder with its pictures and its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict] = []
        (folder / "images").mkdir(parents=True, exist_ok=True)

    def save(self, name: str, image: Image.Image) -> str:
        """Writes a picture; returns its path as manifests name it."""
        image.save(self.folder / "images" / f"{name}.png", optimize=True)
        return f"images/{name}.png"

    def close(self) -> None:
        """Writes the manifest."""
        lines = [json.dumps(row, ensure_ascii=False) for row in self.rows]
        (self.folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def make(root: Path) -> None:
    """All kinds."""
    text_image = Kind(root / "text-image")
    sizes = ((48, 48), (64, 36), (36, 64))
    for number, (shape, colour) in enumerate((s, c) for s in SHAPES for c in COLOURS):
        size = sizes[number % 3]
        path = text_image.save(f"{colour}-{shape}", picture(shape, colour, size=size))
        prompt = f"a {colour} {shape} on a white background"
        text_image.rows.append(
            {
                "image": [path],
                "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": "<image>"}],
                "img_w": [size[0]],
                "img_h": [size[1]],
            }
        )
    text_image.close()

    editing = Kind(root / "editing")
    colours = list(COLOURS)
    for number, shape in enumerate(SHAPES * 2):
        before, after = colours[number % 4], colours[(number + 1) % 4]
        source = editing.save(f"{number}-source", picture(shape, before))
        target = editing.save(f"{number}-target", picture(shape, after))
        editing.rows.append(
            {
                "image": [source, target],
                "conversations": [
                    {"from": "human", "value": f"a {after} {shape} on a white background"},
                    {"from": "gpt", "value": ""},
                ],
                "instruction": f"make the {shape} {after}",
            }
        )
    editing.close()

    perception = Kind(root / "perception")
    for number, shape in enumerate(SHAPES * 2):
        source = perception.save(f"{number}", picture(shape, colours[number % 4], "grey"))
        target = perception.save(f"{number}-mask", mask(shape))
        perception.rows.append(
            {"task": "perceive", "kind": "segment", "source": source, "prompt": f"the {shape}", "target": target}
        )
    perception.close()

    questions = Kind(root / "questions")
    for number, shape in enumerate(SHAPES * 2):
        colour = colours[number % 4]
        path = questions.save(f"{number}", picture(shape, colour, "grey"))
        questions.rows.append(
            {
                "image": path,
                "conversations": [
                    {"from": "human", "value": "<image>\nwhat colour is the shape?"},
                    {"from": "gpt", "value": colour},
                    {"from": "human", "value": "what shape is it?"},
                    {"from": "gpt", "value": shape},
                ],
            }
        )
    questions.close()

    personalization = Kind(root / "personalization")
    for number in range(4):
        first = (SHAPES[number % 3], colours[number % 4])
        second = (SHAPES[(number + 1) % 3], colours[(number + 2) % 4])
        references = [
            personalization.save(f"{number}-{place}", picture(*subject, ground="grey"))
            for place, subject in enumerate((first, second), 1)
        ]
        target = personalization.save(f"{number}-target", pair(first, second))
        personalization.rows.append(
            {
                "original_images": references,
                "generated_images": [target],
                "edit_prompt": "put the subject of image 1 to the left of the subject of image 2",
                "caption": f"a {first[1]} {first[0]} to the left of a {second[1]} {second[0]}",
            }
        )
    personalization.close()


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
