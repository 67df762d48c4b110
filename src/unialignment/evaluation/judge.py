"""Judges what was drawn or said against what the scene world knows to be true, task by task.

Pictures are judged by the world's parser and texts by exact answers; no network takes part. Knows nothing of who drew
them: a model, the ground truth and a floor are judged alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation import clauses, metrics
from unialignment.world import language as lang
from unialignment.world.captions import Description
from unialignment.world.parser import ParsedScene, SceneParser, match_scenes
from unialignment.world.presets import WorldPreset
from unialignment.world.questions import is_correct
from unialignment.world.render import Renderer
from unialignment.world.scene import Scene
from unialignment.world.sprites import SpritePack

Output = np.ndarray | str
"""A picture ``[R, R, 3]`` uint8 for tasks with image targets, else a text."""


class Judge:
    """Scores one output of any task.

    Args:
        pack: The sprites.
        preset: What there can be in a picture.
    """

    def __init__(self, pack: SpritePack, preset: WorldPreset) -> None:
        self.pack, self.preset = pack, preset
        self.parser = SceneParser(pack, preset)
        self.renderer = Renderer(pack, preset.resolution)
        self._parsed: dict[bytes, ParsedScene] = {}
        self._judges: dict[str, Callable[[Sample, np.ndarray], dict[str, float]]] = {
            "generate": self._generate,
            "edit": self._edit,
            "perceive": self._perceive,
            "control": self._control,
            "compose": self._compose,
        }
        self._readers: dict[str, Callable[[Sample, str], dict[str, float]]] = {
            "caption": self._caption,
            "answer": self._answer,
            "infill": self._infill,
        }

    def score(self, sample: Sample, output: Output) -> dict[str, float]:
        """Scores of an output by metric key (``results.METRICS``).

        Args:
            sample: The item, with its facts in ``sample.meta``.
            output: What was produced for it.

        Raises:
            InputError: an unknown task, or an output of the wrong kind for it.
        """
        if isinstance(output, str) and sample.task in self._readers:
            return self._readers[sample.task](sample, output)
        if isinstance(output, np.ndarray) and sample.task in self._judges:
            return self._judges[sample.task](sample, output)
        known = ", ".join([*self._judges, *self._readers])
        raise InputError(
            f"no judge for a {type(output).__name__} as output of task {sample.task!r}; expected a picture or a text "
            f"for one of {known}"
        )

    # --- pictures -----------------------------------------------------------------------------------------------------

    def parsed(self, image: np.ndarray) -> ParsedScene:
        """What the parser sees in a picture."""
        # References show the same pictures again and again, and parsing takes longer than anything else here.
        key = image.tobytes()
        if key not in self._parsed:
            self._parsed[key] = self.parser.parse(image)
        return self._parsed[key]

    def _drawn(self, image: np.ndarray) -> Scene:
        return self.parsed(image).scene

    def _generate(self, sample: Sample, image: np.ndarray) -> dict[str, float]:
        scene, drawn = _scene(sample), self._drawn(image)
        stated: Description = sample.meta["description"]
        scores: dict[str, float] = {
            "generate.objects": metrics.share_found(_names(drawn), _names(scene)),
            "generate.scenes": float(metrics.contains_all(_names(drawn), _names(scene))),
            "generate.background": float(drawn.background == scene.background),
        }
        facts = clauses.stated_facts(drawn, scene, stated)
        if places := [right for kind, right in facts if kind == "place"]:
            scores["generate.places"] = float(all(places))
        if related := [right for kind, right in facts if kind == "relation"]:
            scores["generate.relations"] = float(all(related))
        return scores

    def _edit(self, sample: Sample, image: np.ndarray) -> dict[str, float]:
        before, after = sample.meta["source"], _scene(sample)
        assert sample.target_image is not None
        untouched = (self.renderer.render(before) == self.renderer.render(after)).all(axis=-1)
        return {
            "edit.success": float(match_scenes(self._drawn(image), after).exact(clauses.POSITION_TOLERANCE)),
            "edit.psnr_outside": metrics.psnr(image, sample.target_image, untouched),
        }

    def _perceive(self, sample: Sample, image: np.ndarray) -> dict[str, float]:
        assert sample.target_image is not None
        if sample.kind == "segment":
            return {"segment.iou": metrics.iou(image, sample.target_image)}
        if sample.kind == "depth":
            return {
                "depth.delta1": metrics.depth_delta1(image, sample.target_image),
                "depth.abs_rel": metrics.depth_abs_rel(image, sample.target_image),
            }
        return {"edges.f": metrics.edge_f1(image, sample.target_image)}

    def _control(self, sample: Sample, image: np.ndarray) -> dict[str, float]:
        return {"control.objects": float(metrics.contains_all(_names(self._drawn(image)), _names(_scene(sample))))}

    def _compose(self, sample: Sample, image: np.ndarray) -> dict[str, float]:
        return {"compose.subjects": float(metrics.contains_all(_names(self._drawn(image)), _names(_scene(sample))))}

    # --- texts --------------------------------------------------------------------------------------------------------

    def _caption(self, sample: Sample, text: str) -> dict[str, float]:
        scene = _scene(sample)
        named, expected = set(lang.mentioned(text, self.preset.names)), {item.name for item in scene.objects}
        return {
            "caption.objects": float(named >= expected),
            "caption.exact": float(named == expected),
            "caption.background": float(backgrounds_named(text, self.preset) == {scene.background}),
        }

    def _answer(self, sample: Sample, text: str) -> dict[str, float]:
        return {"vqa.accuracy": float(is_correct(text, sample.meta["question"]))}

    def _infill(self, sample: Sample, text: str) -> dict[str, float]:
        filled, expected = _words(text), [_words(word) for word in sample.meta["words"]]
        if len(filled) != sum(map(len, expected)):
            return {"infill.accuracy": 0.0}
        starts = np.cumsum([0, *map(len, expected)])
        right = [filled[starts[gap] : starts[gap + 1]] == expected[gap] for gap in sample.meta["gaps"]]
        return {"infill.accuracy": float(np.mean(right))}


def _scene(sample: Sample) -> Scene:
    """What the output shows or tells of; for edits and compositions the result."""
    scene = sample.meta["scene"]
    assert isinstance(scene, Scene)
    return scene


def backgrounds_named(text: str, preset: WorldPreset) -> set[str]:
    """Background colours that a text names, class names such as ``"red apple"`` not counted."""
    text = text.lower()
    forms = sorted({form for name in preset.names for form in (name, lang.plural(name))}, key=len, reverse=True)
    rest = re.sub(r"(?<![\w-])(?:" + "|".join(map(re.escape, forms)) + r")(?![\w-])", " ", text)
    return {name for name in preset.backgrounds if re.search(rf"\b{name}\b", rest)}


def _names(scene: Scene) -> list[str]:
    return [item.name for item in scene.objects]


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())
