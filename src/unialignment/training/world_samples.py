"""What the scene world gives to training: which scenes are drawn for a sample, and what is varied in them.

A pure function of task and number, as the user's own data are. Knows nothing of batches, tokenizers or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from unialignment.data.layouts import PAIR_TASKS
from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.tasks import TASKS
from unialignment.training.config import TransformerConfig
from unialignment.training.jitter import jitter, recolor_sprite, relight_sprite, vary_sprite
from unialignment.world import language as lang
from unialignment.world.splits import is_held_out_style

_JITTER = 0x6A6974
_OTHERS = 0x6F746872
_RECOLOR = 0x7265636F
_RELIT = 0x72656C69
_ANOTHER = 1 << 6
"""Added to the attempt of a sample that teaches nothing; more than the attempts there are."""
_COPIED = ("edit", "compose", "perceive")
"""Tasks whose result is told by their sources, whatever these show."""
_ELSEWHERE = 1 << 40
"""Offset of the substitutes for samples that do not fit; no run is that long."""
_OTHER_PAIRS = 1 << 60
"""Offset of the pair ids of scenes of any classes: what ``generate`` shows at their index is another scene."""


def open_stream(
    config: TransformerConfig,
    split: Literal["train", "held_out"],
    seed: int,
    others: bool = False,
    own_styles: bool = False,
) -> Any:
    """The world's sample stream of a configuration.

    ``world.styles`` and ``world.questions`` hold for the split that is trained on; what validation measures stays the
    preset's. ``others``: with objects of all classes of the sprite pack (``world.others``). ``own_styles``: with the
    preset's styles in any case.

    Raises:
        InputError: a style that the sprite pack doesn't have, or an unknown kind of question.
    """
    from unialignment.world.presets import preset
    from unialignment.world.questions import KINDS
    from unialignment.world.sprites import SpritePack
    from unialignment.world.stream import WorldStream

    pack = SpritePack.load(config.world.pack)
    world = config.world
    chosen = preset(world.preset, pack)
    if others:
        chosen = replace(chosen, names=pack.names)
    if world.styles and split == world.split and not own_styles:
        unknown = sorted(set(world.styles) - set(pack.styles))
        if unknown:
            raise InputError(
                f"world.styles names {', '.join(unknown)}, which the sprite pack lacks; it has "
                f"{', '.join(pack.styles)}. Rebuild it with `unialign world build --extra`, or leave them out"
            )
        chosen = replace(chosen, styles=tuple(world.styles))
    kinds = world.questions if world.questions and split == world.split else KINDS
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"world.questions names {', '.join(unknown)}; expected kinds are {', '.join(KINDS)}")
    return WorldStream(pack, chosen, split, seed, varied=world.varied, long=world.long, questions=kinds)


class WorldSamples:
    """The sprite world's stream, with substitutes, and with a pool of scenes where embeddings are kept of them.

    ``chunks`` and :meth:`epoch_length` are those of :class:`~unialignment.data.mixture.UserStream`. ``strength`` is
    that of :mod:`~unialignment.training.jitter` on pictures of tasks whose target is a text; ``share`` of them come
    from ``others``, a stream of more classes: the more drawings, the less it helps to learn each by heart. Of tasks
    that copy their sources, ``copied`` is that share, and ``recolored`` the share in which drawings that stay are
    changed, in sources and target alike. ``open_styles``: styles aren't learned where the split withholds one.
    ``relit`` is the share of pictures to read whose drawings get another hand's ways, where no style is learned.
    ``texts`` is the stream of tasks without pictures, in the styles that pictures are to be drawn in; by default the
    same stream.
    """

    def __init__(
        self,
        stream: Any,
        counts: Mapping[str, int],
        pool: int | None = None,
        strength: float = 0.0,
        others: Any = None,
        share: float = 0.0,
        copied: float = 0.0,
        recolored: float = 0.0,
        open_styles: bool = False,
        relit: float = 0.0,
        texts: Any = None,
    ) -> None:
        self.stream, self.pool, self.strength = stream, pool, strength
        self.others, self.share, self.copied, self.recolored = others, share, copied, recolored
        self.open_styles, self.relit = open_styles, relit
        self.texts = stream if texts is None else texts
        # One stride for all tasks: those that show the same scene at the same index meet in one micro-batch,
        # which is where the contrastive loss finds its pairs.
        self.chunks = dict.fromkeys(counts, max(counts.values(), default=1))

    def epoch_length(self, task: str) -> None:
        """Scenes have no end."""

    def sample(self, task: str, number: int, attempt: int = 0, pictures: bool = True) -> Sample:
        """The sample of a task at a number; ``attempt`` above 0 gives a substitute."""
        place = (number % self.pool if self.pool else number) + attempt * _ELSEWHERE
        read = TASKS.get(task).target == "text"
        seen = TASKS.get(task).max_sources > 0
        jittered = bool(self.strength) and read and seen
        recolored = self._chosen(_RECOLOR, place, self.recolored if task in ("edit", "compose") else 0.0)
        # The same for all tasks at a place, as these may show one scene.
        beyond = self.copied if task in _COPIED else self.share if read and seen else 0.0
        other = self._chosen(_OTHERS, place, beyond)
        stream = self.others if other else self.stream if seen or not read else self.texts
        sample: Sample = stream.sample(task, place, pictures and not (jittered or recolored))
        if read and seen and self.open_styles:
            spans = _withheld_styles(sample, stream.preset)
            if spans == ((0, len(sample.target_text or "")),):  # a question that asks for nothing else
                return self.sample(task, number, attempt + _ANOTHER, pictures)
            sample = replace(sample, given=spans)
        keys = _world_keys(sample, place)
        if other:
            keys = tuple(f"{key}:others" for key in keys)
            if sample.pair_id is not None:
                sample = replace(sample, pair_id=sample.pair_id + _OTHER_PAIRS)
        if jittered:
            # A picture of its own for every number, hence nothing that could be kept for it would be used again.
            rng = np.random.default_rng([_JITTER, place, number])
            relit = self._chosen(_RELIT, place + number, self.relit)
            styles = _styles(sample, stream.preset) if relit else None
            if styles is not None:
                sample = replace(sample, given=styles)
            if pictures:
                drawn = self._read(sample.meta["scene"], rng, styles is not None)
                sample = replace(sample, sources=(drawn,))
            keys = tuple(f"{key}:jitter:{self.strength}:{number}" for key in keys)
        if recolored:
            if pictures:
                sample = self._recolored(sample, place)
            keys = tuple(f"{key}:recolored" for key in keys)
        return replace(sample, meta={**sample.meta, "pictures": keys})

    @staticmethod
    def _chosen(salt: int, place: int, share: float) -> bool:
        return bool(share) and bool(np.random.default_rng([salt, place]).random() < share)

    def _read(self, scene: Any, rng: np.random.Generator, relit: bool = False) -> Any:
        """A picture of a scene to read: no drawing in it, nor the whole, is quite as ever before."""

        def change(item: Any, color: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if relit:
                color, alpha = relight_sprite(color, alpha, 1.0, rng)
            return vary_sprite(color, alpha, self.strength, rng)

        return jitter(self.stream.renderer.render(scene, change), self.strength, rng)

    def _recolored(self, sample: Sample, place: int) -> Sample:
        """Its pictures, with drawings of the sources that the target has too changed in all of them alike.

        What the target alone shows is drawn as it is: nothing but the prompt tells how.
        """
        result = sample.meta["scene"]
        sources = (sample.meta["source"],) if sample.task == "edit" else sample.meta["sources"]
        given = dict.fromkeys((item.name, item.style) for scene in sources for item in scene.objects)
        seeds = {key: [_RECOLOR, place, 1 + number] for number, key in enumerate(given)}

        def change(item: Any, color: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            seed = seeds.get((item.name, item.style))
            return (color, alpha) if seed is None else recolor_sprite(color, alpha, 1.0, np.random.default_rng(seed))

        render = self.stream.renderer.render
        return replace(
            sample,
            sources=tuple(render(scene, change) for scene in sources),
            target_image=render(result, change),
        )

    def bare(self, task: str, number: int, attempt: int = 0) -> tuple[Sample, tuple[str, ...]]:
        """:meth:`sample` without drawing its pictures, and a key of each of them."""
        sample = self.sample(task, number, attempt, False)
        return sample, sample.meta["pictures"]


def _styles(sample: Sample, preset: Any) -> tuple[tuple[int, int], ...] | None:
    """Where a caption says styles, so that they can be given; ``None`` where a text can't do without learning them."""
    adjectives = "|".join(lang.style_adjective(style) for style in sorted(set(preset.styles)))
    if sample.task == "answer":
        texts = f"{sample.prompt} {sample.target_text}"
        return None if sample.kind == "style" or re.search(rf"\b({adjectives})\b", texts) else ()
    if sample.task != "caption":
        return None
    return tuple(found.span() for found in re.finditer(rf"\b({adjectives})\b", sample.target_text or ""))


def _withheld_styles(sample: Sample, preset: Any) -> tuple[tuple[int, int], ...]:
    """Where a text to be read out says the style of a class of which the split withholds a drawing.

    Captions and answers of the training split never give such a class the style that is withheld. What they teach is
    that it doesn't exist, however plainly a picture shows it.
    """
    text = sample.target_text or ""
    styles = set(preset.styles)
    adjectives = "|".join(lang.style_adjective(style) for style in sorted(styles))
    if sample.task == "answer":
        asked = lang.mentioned(sample.prompt, preset.names)
        known = re.fullmatch(adjectives, text) is None or not any(_withheld(name, styles) for name in asked)
        return () if known else ((0, len(text)),)
    names = {item.name for item in sample.meta["scene"].objects if _withheld(item.name, styles)}
    if sample.task != "caption" or not names:
        return ()
    nouns = "|".join(re.escape(noun) for name in sorted(names) for noun in (lang.plural(name), name))
    # Things that have no plural are counted in pieces: "two flat sets of scissors".
    return tuple(found.span(1) for found in re.finditer(rf"\b({adjectives}) (?:\w+ of )?(?:{nouns})\b", text))


def _withheld(name: str, styles: set[str]) -> bool:
    return any(is_held_out_style(name, style) for style in styles)


def _world_keys(sample: Sample, place: int) -> tuple[str, ...]:
    """A key of each picture of a world's sample, drawn or not: target first if it is one, then sources."""
    if sample.task in PAIR_TASKS:  # these show one scene at one index
        return (f"world:pair:{place}",)
    task = TASKS.get(sample.task)
    sources = len(sample.meta["sources"]) if sample.task == "compose" else task.min_sources
    names = (("target",) if task.target == "image" else ()) + tuple(map(str, range(sources)))
    return tuple(f"world:{sample.task}:{place}:{name}" for name in names)
