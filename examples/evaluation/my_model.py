"""A model of one's own for ``unialign eval``: the whole adapter. Leave out what your model doesn't do.

unialign eval pope POPE/ --model python:examples/evaluation/my_model.py:MyModel --out runs/mine
"""

from PIL import Image, ImageOps


class MyModel:
    """Edits by taking the colours away, draws plain colours, and agrees with everything."""

    def identity(self):  # everything that decides what it makes: records of two identities are never mixed
        return {"kind": "my model", "version": 1}

    def draw(self, item, seed):  # for benchmarks that want pictures; item.kind is "generate" or "edit"
        if item.kind == "edit":
            return ImageOps.grayscale(Image.open(item.photo)).convert("RGB"), {}
        return Image.new("RGB", (64, 64), (seed % 256, len(item.prompt) % 256, 0)), {"note": "goes into the record"}

    def tell(self, picture, question, hint, seed):  # for benchmarks that want texts; no question: a description
        return "yes" if question else f"a picture of {picture.width} by {picture.height} pixels"

    def chart(self, picture, kind, seed):  # for benchmarks that want maps: "depth" is bright where near
        return ImageOps.grayscale(picture)
