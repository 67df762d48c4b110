"""The endless stream of samples of every task, each a pure function of seed, split, task and index.

Puts together what the other modules of the world know; knows nothing of models, batching or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.world import captions, compositions, edits, perception, questions
from unialignment.world import language as lang
from unialignment.world.layout import Split, sample_scene
from unialignment.world.presets import WorldPreset
from unialignment.world.questions import KINDS
from unialignment.world.render import Renderer
from unialignment.world.scene import Scene
from unialignment.world.splits import is_held_out_style
from unialignment.world.sprites import SpritePack

SPLITS: tuple[Split, ...] = ("train", "held_out")
TASKS = ("generate", "caption", "answer", "edit", "perceive", "control", "compose", "infill", "rewrite")

# Tasks of one group show the same scene at the same index. Numbers are part of the data's identity: never renumber.
_GROUPS = {"generate": 0, "caption": 0, "infill": 0, "answer": 1, "edit": 2, "perceive": 3, "control": 4, "compose": 5,
           "rewrite": 6}  # fmt: skip

_PLAIN_PROMPTS, _LONG_PROMPTS, _RELATED_PROMPTS = 0.1, 0.15, 0.6
"""Shares of prompts to rewrite that are canonical already, and long. The rest are freely worded; of these, the last
share state relations where the scene has any: those leave most open."""

GAP = "[MASK]"
"""One missing word in the prompt of ``infill``."""
_PLAIN_WORDS = lang.words(
    "a an the in on at of to is are and with there also one against background, background draw picture image"
)


class WorldStream:
    """Samples of the scene world.

    Args:
        pack: Artwork.
        preset: Which part of the world.
        split: ``"train"`` or ``"held_out"``.
        seed: Everything follows from it; streams of different seeds are independent.
        varied: Fraction of indices at which generate, infill and control use a freely worded caption instead of the
            canonical one. The target of caption is always canonical.
        long: Fraction of the varied prompts of generate that are long captions, of 60 words and more.
        questions: Kinds of questions that answer draws from, evenly; one named twice is twice as frequent.
        renderer: Draws the pictures; by default one for the preset's resolution.

    Raises:
        InputError: unknown split.
    """

    def __init__(
        self,
        pack: SpritePack,
        preset: WorldPreset,
        split: Split,
        seed: int,
        *,
        varied: float = 0.5,
        long: float = 0.0,
        questions: Sequence[str] = KINDS,
        renderer: Renderer | None = None,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        self.pack = pack
        self.preset = preset
        self.split = split
        self.seed = seed
        self.varied = varied
        self.long = long
        self.questions = tuple(questions)
        self.renderer = renderer if renderer is not None else Renderer(pack, preset.resolution)
        self._makers: dict[str, Callable[[np.random.Generator, int, bool], Sample]] = {
            "generate": self._generate,
            "caption": self._caption,
            "infill": self._infill,
            "answer": self._answer,
            "edit": self._edit,
            "perceive": self._perceive,
            "control": self._control,
            "compose": self._compose,
            "rewrite": self._rewrite,
        }

    @cached_property
    def _lone(self) -> bool:
        """Whether scenes of one object exist in the split; held-out ones don't where no drawing style is held out."""
        pairs = ((name, style) for name in self.preset.names for style in self.preset.styles)
        return self.split == "train" or any(is_held_out_style(name, style) for name, style in pairs)

    def sample(self, task: str, index: int, draw: bool = True) -> Sample:
        """The sample of a task at an index, always the same; its pictures are left out unless ``draw``.

        ``meta["scene"]`` is what the picture shows, or for image targets shall show. Further facts for judging:
        generate, control, infill: ``description`` (:class:`captions.Description`: what the prompt states);
        answer: ``question`` (:class:`questions.Question`); edit: ``source`` (scene) and ``edit`` (:class:`edits.Edit`);
        perceive, control: ``indices`` (objects in the mask); compose: ``sources`` (scenes) and ``composition``;
        infill: ``words`` (of the full text, split at blanks) and ``gaps`` (indices of those that are hidden);
        rewrite: ``description`` (of the prompt).

        Raises:
            InputError: unknown task or negative index.
        """
        return self._make(task, index, draw)

    def texts(self, task: str, index: int) -> tuple[str, ...]:
        """Prompt and target text of :meth:`sample`, without drawing anything."""
        sample = self._make(task, index, False)
        return tuple(text for text in (sample.prompt, sample.target_text) if text)

    def _make(self, task: str, index: int, draw: bool) -> Sample:
        if task not in _GROUPS:
            raise InputError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        if index < 0:
            raise InputError(f"index={index}; expected 0 or more")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), _GROUPS[task], index])
        return self._makers[task](rng, index, draw)

    def _scene(self, rng: np.random.Generator, **arguments: Any) -> Scene:
        return sample_scene(rng, self.preset, self.split, **arguments)

    def _describe(self, scene: Scene, rng: np.random.Generator) -> captions.Description:
        if rng.random() < self.varied:
            return captions.describe_short(scene, rng)
        return captions.describe_canonical(scene)

    def _generate(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        scene = self._scene(rng)
        made = self._describe(scene, rng)
        if made.kind == "short" and self.long and rng.random() < self.long:
            made = captions.describe_long(scene, rng)
        image = self.renderer.render(scene) if draw else None
        meta = {"scene": scene, "description": made}
        return Sample("generate", made.text, target_image=image, kind=made.kind, pair_id=index, meta=meta)

    def _caption(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        scene = self._scene(rng)
        sources = (self.renderer.render(scene),) if draw else ()
        made = captions.describe_canonical(scene)
        meta = {"scene": scene, "description": made}
        return Sample("caption", "", sources, target_text=made.text, kind=made.kind, pair_id=index, meta=meta)

    def _infill(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        scene = self._scene(rng)
        made = self._describe(scene, rng)
        words = made.text.split(" ")
        # Mostly words that the picture tells; of the others a few, since their wording is free.
        share = 0.15 + 0.5 * rng.random()
        chances = [share / 4 if word in _PLAIN_WORDS else share for word in words]
        gaps = [i for i, chance in enumerate(chances) if rng.random() < chance]
        if not gaps:
            gaps = [max(range(len(words)), key=chances.__getitem__)]
        given = list(words)
        for i in gaps:
            # punctuation stays, so that a gap is a word
            given[i] = GAP + words[i][len(words[i].rstrip(".,;:?!")) :]
        meta = {"scene": scene, "description": made, "gaps": tuple(gaps), "words": tuple(words)}
        sources = (self.renderer.render(scene),) if draw else ()
        prompt = " ".join(given)
        return Sample("infill", prompt, sources, target_text=made.text, kind=made.kind, pair_id=index, meta=meta)

    def _answer(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        question = None
        kind = lang.pick(rng, self.questions)
        while question is None:
            if kind == "relation":
                scene = self._scene(rng, count=2 + int(rng.random() * (self.preset.max_objects - 1)))
            elif kind == "count" and self.preset.max_objects > 1 and rng.random() < 0.4:
                scene = self._scene(rng, repeat=True)
            else:
                scene = self._scene(rng)
            question = questions.ask(scene, rng, kind, names=self.preset.names)
        sources = (self.renderer.render(scene),) if draw else ()
        meta = {"scene": scene, "question": question}
        return Sample("answer", question.question, sources, target_text=question.answer, kind=question.kind, meta=meta)

    def _edit(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        number = rng.random()
        clauses = 1 if number < 0.7 else 2 if number < 0.9 else 3
        kind = lang.pick(rng, edits.KINDS)
        most = self.preset.max_objects
        edit = None
        while edit is None:
            # The edit itself brings the held-out combination in for half of those kinds that can.
            new = self.split == "held_out" and kind in ("replace", "add", "restyle") and rng.random() < 0.5
            low, high = 2 if kind == "remove" or not (new or self._lone) else 1, most - 1 if kind == "add" else most
            count = low + int(rng.random() * (max(high, low) - low + 1))
            scene = sample_scene(rng, self.preset, "train" if new else self.split, count=count)
            edit = edits.try_edit(scene, rng, self.preset, self.split, clauses, kind)
            if edit is None and rng.random() < 0.5:
                kind = lang.pick(rng, edits.KINDS)
        sources = (self.renderer.render(scene),) if draw else ()
        image = self.renderer.render(edit.result) if draw else None
        meta = {"scene": edit.result, "source": scene, "edit": edit}
        name = edit.kinds[0] if clauses == 1 else f"{clauses} clauses"
        return Sample("edit", edit.instruction, sources, target_image=image, kind=name, meta=meta)

    def _perceive(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        scene = self._scene(rng)
        found = perception.sample_perception(scene, rng, self.renderer if draw else _NoMaps())
        sources = (self.renderer.render(scene),) if draw else ()
        image = found.map if draw else None
        meta = {"scene": scene, "indices": found.indices}
        return Sample("perceive", found.prompt, sources, target_image=image, kind=found.kind, meta=meta)

    def _control(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        scene = self._scene(rng)
        found = perception.sample_perception(scene, rng, self.renderer if draw else _NoMaps())
        made = self._describe(scene, rng)
        prompt = perception.control_prompt(found, made.text, rng)
        image = self.renderer.render(scene) if draw else None
        meta = {"scene": scene, "indices": found.indices, "description": made}
        return Sample("control", prompt, (found.map,) if draw else (), target_image=image, kind=found.kind, meta=meta)

    def _compose(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        references = 2 if rng.random() < 0.6 else 3
        made = compositions.sample_composition(rng, self.preset, self.split, references)
        sources = tuple(self.renderer.render(scene) for scene in made.sources) if draw else ()
        image = self.renderer.render(made.result) if draw else None
        meta = {"scene": made.result, "sources": made.sources, "composition": made}
        return Sample("compose", made.instruction, sources, target_image=image, kind=made.kind, meta=meta)

    def _rewrite(self, rng: np.random.Generator, index: int, draw: bool) -> Sample:
        """Any prompt, and the one text that the model gives a picture of the same scene: every place is said in it."""
        scene = self._scene(rng)
        number = rng.random()
        if number < _PLAIN_PROMPTS:
            made = captions.describe_canonical(scene)
        elif number < 1 - _LONG_PROMPTS:
            made = captions.describe_short(scene, rng)
            related = rng.random() < _RELATED_PROMPTS and len(scene.objects) > 1
            for _ in range(8 if related else 0):
                if made.relations or made.between:
                    break
                made = captions.describe_short(scene, rng)
        else:
            made = captions.describe_long(scene, rng)
        meta = {"scene": scene, "description": made}
        target = captions.describe_canonical(scene).text
        return Sample("rewrite", made.text, target_text=target, kind=made.kind, meta=meta)


class _NoMaps:
    """Stands in for a renderer where only the texts are wanted."""

    _blank = np.zeros((1, 1, 3), np.uint8)

    def mask(self, scene: Scene, index: Any) -> Any:
        return self._blank

    def depth(self, scene: Scene) -> Any:
        return self._blank

    def edges(self, scene: Scene) -> Any:
        return self._blank


def all_language(preset: WorldPreset, n: int, seed: int) -> Iterator[str]:
    """``n`` texts of all tasks in turn (prompts and target texts, train split), for training a tokenizer.

    Every class name, style, size, background and number word occurs at least once, before anything else.
    """
    basics = [*preset.names, *map(lang.plural, preset.names), *map(lang.style_adjective, preset.styles)]
    basics += [*preset.backgrounds, *lang.SIZE_ADJECTIVES.values(), *lang.NUMBER_WORDS[:7], "yes", "no"]
    stream = WorldStream(None, preset, "train", seed, long=0.1, renderer=_NoMaps())  # type: ignore[arg-type]
    given = 0
    for text in basics:
        if given >= n:
            return
        given += 1
        yield text
    index = 0
    while True:
        for task in TASKS:
            for text in stream.texts(task, index):
                if given >= n:
                    return
                given += 1
                yield text.replace(GAP, "")
        index += 1
