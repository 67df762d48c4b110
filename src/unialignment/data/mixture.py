"""Samples of a user's own data: sources mixed by weight, each number of a task leading to one sample for ever.

The counterpart of the sprite world's stream. Knows nothing of models, tokenizers or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unialignment.data.index import RowIndex, cached_index, renamed
from unialignment.data.layouts import PAIR_TASKS, Recipe, read_row
from unialignment.data.order import Order, Quota, _mix
from unialignment.data.pictures import PictureLoader, Size, bucket_sizes, nearest_bucket
from unialignment.data.quarantine import BadRow, Quarantine, read_list
from unialignment.data.rows import Rows, open_rows
from unialignment.data.sample import Sample
from unialignment.data.streamed import StreamedRows
from unialignment.errors import AssetError, InputError

Split = Literal["train", "held_out"]

GAP = "[MASK]"
"""A missing word in the prompt of ``infill``."""


@dataclass(frozen=True)
class SourceSpec:
    """One source; the fields are those of the configuration's ``data.sources``.

    Attributes:
        path: File, folder, pattern, or a data set's name; unused for ``world``.
        format: ``auto``, ``jsonl``, ``parquet``, ``webdataset``, ``dataset``, or ``world``: the sprite world.
        split: Of a named data set.
        streaming: Read forward only, nothing copied to disk.
        tasks: Only these tasks; also says what picture-to-picture rows are for.
        weight: Share among the sources that serve a task.
        root: Folder that relative paths of pictures start from. Default: the manifest's.
        columns: Our column names to theirs.
    """

    path: str = ""
    format: str = "auto"
    split: str = "train"
    streaming: bool = False
    tasks: tuple[str, ...] | None = None
    weight: float = 1.0
    root: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """How rows become samples.

    Attributes:
        resolution: Side in pixels, of squares or, with buckets, of the square of equal area.
        buckets: Whether pictures keep about their shape.
        bucket_step: Sides are multiples of this.
        max_ratio: Longest over shortest side.
        fit: ``crop`` or ``pad``.
        max_pixels: Larger pictures are refused.
        held_out: Share of rows kept for validation.
        shuffle_block: Rows shuffled among one another in streamed data.
    """

    resolution: int = 64
    buckets: bool = False
    bucket_step: int = 16
    max_ratio: float = 2.0
    fit: Literal["crop", "pad"] = "crop"
    max_pixels: int = 100_000_000
    held_out: float = 0.02
    shuffle_block: int = 256

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes that pictures are brought to."""
        if not self.buckets:
            return ((self.resolution, self.resolution),)
        return bucket_sizes(self.resolution, self.bucket_step, self.max_ratio)

    def size_for(self, shape: Size) -> Size:
        """The size that a picture of ``shape`` is brought to."""
        sizes = self.sizes
        return sizes[nearest_bucket(shape, sizes)] if len(sizes) > 1 else sizes[0]


class LocalSource:
    """Rows at random access, split into training and held-out ones.

    Args:
        spec: The source.
        settings: How rows become samples.
        excluded: ``(source, row)`` of rows to leave out.
    """

    def __init__(self, spec: SourceSpec, settings: DataSettings, excluded: set[tuple[str, str]]) -> None:
        self.spec = spec
        self.rows: Rows = open_rows(spec.path, spec.format, spec.split, spec.root)
        self.name = self.rows.name
        self.loader = PictureLoader(self.rows.root, settings.max_pixels, settings.fit)
        self.index: RowIndex = cached_index(self.rows, self.loader, spec.tasks, spec.columns, settings.buckets)
        self.fingerprint = self.rows.fingerprint
        self._excluded = np.zeros(len(self.rows), bool)
        for number in range(len(self.rows)) if excluded else ():
            self._excluded[number] = (self.name, self.rows.label(number)) in excluded
        self._held = _held_out(len(self.rows), settings.held_out)
        self._settings = settings

    def numbers(self, task: str, split: Split | None) -> NDArray[np.int64]:
        """Rows of a task in a split; ``None``: all."""
        found = self.index.rows(task)
        found = found[~self._excluded[found]]
        if split is None or not len(found):
            return found
        held = self._held[found]
        # Of a small set at least one row is held out, and at least one trained on; a lone row is both.
        if self._settings.held_out > 0 and not held.any() and len(found) > 1:
            held = np.zeros(len(found), bool)
            held[-1] = True
        if len(found) == 1:
            return found if split == "train" or self._settings.held_out > 0 else found[:0]
        if held.all():
            held[0] = False
        return found[held] if split == "held_out" else found[~held]

    def order(self, task: str, split: Split | None, chunk: int, seed: int) -> Order | None:
        """Their order; ``None`` where there are none."""
        rows = self.numbers(task, split)
        if not len(rows):
            return None
        buckets = None
        if self.index.sizes is not None:
            sizes = self._settings.sizes
            shapes = self.index.sizes[rows]
            unique, inverse = np.unique(shapes, axis=0, return_inverse=True)
            nearest = np.array([nearest_bucket((int(w), int(h)), sizes) for w, h in unique])
            buckets = nearest[inverse.reshape(-1)]
        return Order(rows, buckets, chunk, seed)


def _held_out(count: int, share: float) -> NDArray[np.bool_]:
    """Which rows are held out: a hash of their number, so that the choice is everybody's and for ever."""
    if share <= 0:
        return np.zeros(count, bool)
    words = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    words ^= words >> np.uint64(31)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(29)
    return words < np.uint64(min(int(share * 2**64), 2**64 - 1))


class UserStream:
    """Samples of all sources.

    Args:
        sources: What to read.
        settings: How rows become samples.
        chunks: Samples of each task in a micro-batch. Tasks that show the same rows (generate, caption, infill) are
            numbered alike, with the largest of their counts.
        seed: Chooses every order.
        split: ``train``, ``held_out`` (of local sources), or ``None``: all rows.
        quarantine: Told of bad rows.
        excluded: Rows to leave out, from :func:`~unialignment.data.quarantine.read_list`.
        bookmarks: Folder for the positions of streamed sources.
        world: Opens a source of format ``world``: ``sample(task, number, attempt, pictures)``, with the keys of its
            pictures in ``meta["pictures"]``.
        whole: Says whether a word is a single token, so that ``infill`` can leave it out; ``None``: any word is.

    Raises:
        AssetError, InputError: a source can't be used.
    """

    def __init__(
        self,
        sources: Sequence[SourceSpec],
        settings: DataSettings,
        chunks: Mapping[str, int],
        seed: int = 0,
        split: Split | None = "train",
        quarantine: Quarantine | None = None,
        excluded: Path | None = None,
        bookmarks: Path | None = None,
        world: Callable[[], Any] | None = None,
        whole: Callable[[str], bool] | None = None,
    ) -> None:
        self.settings, self.seed, self.split = settings, seed, split
        self.quarantine = quarantine or Quarantine()
        self.whole = whole
        together = max((chunks.get(task, 0) for task in PAIR_TASKS), default=0)
        self.chunks = {task: together if task in PAIR_TASKS else count for task, count in chunks.items() if count}
        listed = read_list(excluded) if excluded is not None else set()
        self.sources: list[Any] = []
        for spec in sources:
            if spec.format == "world":
                if world is None:
                    raise InputError("a source of format 'world' is of no use here")
                self.sources.append(world())
            elif spec.streaming:
                self.sources.append(
                    StreamedRows(
                        spec.path, spec.format, spec.split, spec.root, _mix(seed, len(self.sources)) >> 1,
                        settings.shuffle_block, bookmarks, self.quarantine,
                    )
                )  # fmt: skip
            else:
                self.sources.append(LocalSource(spec, settings, listed))
        self.specs = tuple(sources)
        # Rows of one micro-batch come from one bucket or lane, so the sources take turns by whole chunks then.
        self._by_chunk = settings.buckets or any(spec.streaming for spec in sources)
        self._orders: dict[tuple[int, str], Order | None] = {}
        self._quotas: dict[str, Quota] = {}
        self._loaders = [
            None if spec.format == "world" else PictureLoader(self._root(source), settings.max_pixels, settings.fit)
            for spec, source in zip(self.specs, self.sources, strict=True)
        ]
        for task in self.chunks:
            self._quotas[task] = self._share(task)
        for source in self.sources:
            if isinstance(source, LocalSource):
                for problem in source.index.problems:
                    self.quarantine.note(problem)

    @staticmethod
    def _root(source: Any) -> Path:
        root: Path = source.root if isinstance(source, StreamedRows) else source.rows.root
        return root

    def _serves(self, number: int, task: str) -> bool:
        spec, source = self.specs[number], self.sources[number]
        if spec.tasks is not None and task not in spec.tasks:
            return False
        if isinstance(source, LocalSource):
            chunk = self.chunks[task]
            # Pair tasks share the seed, and with it the row at each number.
            self._orders[number, task] = source.order(task, self.split, chunk, _mix(self.seed, number) >> 1)
            return self._orders[number, task] is not None
        return self.split != "held_out" or spec.format == "world"

    def _share(self, task: str) -> Quota:
        weights = [spec.weight if self._serves(i, task) else 0.0 for i, spec in enumerate(self.specs)]
        if not any(weights):
            have = sorted({name for s in self.sources if isinstance(s, LocalSource) for name in s.index.count()})
            wanted = "held-out " if self.split == "held_out" else ""
            hint = (
                "streamed sources can't hold rows out: name others in data.validation"
                if self.split == "held_out" and any(spec.streaming for spec in self.specs)
                else "set data.held_out above 0 or name data.validation"
                if self.split == "held_out" and not self.settings.held_out
                else f"the sources serve {', '.join(have) or 'nothing'}; set mixture.{task}=0 or add a source"
            )
            raise AssetError(f"no source has {wanted}rows for the task {task!r}: {hint}. See `unialign data check`.")
        return Quota(weights, _mix(self.seed, 3) >> 1)

    @property
    def fingerprint(self) -> str:
        """Changes with the data, the settings and the sources' tasks, not with their order or weights."""
        parts = [repr(self.settings)]
        for spec, source in zip(self.specs, self.sources, strict=True):
            inner = getattr(source, "fingerprint", "world")
            parts.append(f"{inner}:{spec.tasks}:{sorted(spec.columns.items())}")
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    # ---------------------------------------------------------------------------------------------------- samples

    def sample(self, task: str, number: int, attempt: int = 0) -> Sample:
        """The sample of a task at a number, always the same.

        Args:
            task: Task name.
            number: 0 or more.
            attempt: Above 0: a substitute for a sample that can't be used.

        Raises:
            BadRow: the row's pictures or texts can't be read; ask for the next attempt.
            AssetError: more rows are bad than the quarantine's limit.
        """
        return self._sample(task, number, attempt, True)

    def bare(self, task: str, number: int, attempt: int = 0) -> tuple[Sample, tuple[str, ...]]:
        """:meth:`sample` without its pictures, and a key of each of them: target first if it is one, then sources."""
        sample = self._sample(task, number, attempt, False)
        return sample, sample.meta["pictures"]

    def _sample(self, task: str, number: int, attempt: int, pictures: bool) -> Sample:
        if task not in self._quotas:
            raise InputError(f"no source was opened for the task {task!r}; known are {', '.join(self._quotas)}")
        which, inner, chunk = self._locate(task, number)
        spec, source = self.specs[which], self.sources[which]
        if spec.format == "world":
            sample: Sample = source.sample(task, inner, attempt, pictures)
            return sample
        identity, label, row = self._row(which, source, task, inner, chunk, attempt)
        try:
            found = [r for r in read_row(renamed(row, spec.columns), spec.tasks) if r.task == task]
            rng = np.random.default_rng((self.seed, which, number, attempt))
            recipe = found[int(rng.integers(len(found)))] if len(found) > 1 else found[0]
            made = self._build(recipe, which, identity, rng, pictures)
        except BadRow:
            raise
        except InputError as error:
            problem = BadRow(source.name, label, str(error))
            self.quarantine.bad(problem)
            raise problem from None
        self.quarantine.good()
        return made

    def _locate(self, task: str, number: int) -> tuple[int, int, int]:
        """Source of a number, the number among that source's own, and the length of a chunk there."""
        quota, chunk = self._quotas[task], self.chunks[task]
        if self._by_chunk:
            block, slot = divmod(number, chunk)
            which, inner = quota.share(block)
            return which, inner * chunk + slot, chunk
        return *quota.share(number), 1

    def _row(
        self, which: int, source: Any, task: str, inner: int, chunk: int, attempt: int
    ) -> tuple[str, str, Mapping[str, Any]]:
        if isinstance(source, LocalSource):
            order = self._orders[which, task]
            assert order is not None
            number = order.row(inner, attempt)
            try:
                return str(number), source.rows.label(number), source.rows.row(number)
            except BadRow as problem:
                self.quarantine.bad(problem)
                raise
        block, slot = divmod(inner, chunk)
        block, lane = divmod(block, source.lanes)
        offset = block * chunk + slot
        group = "pair" if task in PAIR_TASKS else task
        serving = PAIR_TASKS if group == "pair" else (task,)
        spec = self.specs[which]

        def wanted(row: Mapping[str, Any], place: str) -> bool:
            try:
                return any(recipe.task in serving for recipe in read_row(renamed(row, spec.columns), spec.tasks))
            except InputError as error:
                self.quarantine.bad(BadRow(source.name, str(row.get("__key__", place))[:80], str(error)))
                return False

        row = source.row(group, wanted, lane, offset, attempt)
        label = str(row.get("__key__", f"lane {lane}, row {offset + 1}"))
        return f"{lane}/{offset}/{attempt}", label, row

    def _build(self, recipe: Recipe, which: int, identity: str, rng: np.random.Generator, pictures: bool) -> Sample:
        loader = self._loaders[which]
        assert loader is not None
        size = self.settings.sizes[0]
        if self.settings.buckets:
            shape = recipe.size if recipe.size is not None else self._shape(which, identity, recipe, loader)
            size = self.settings.size_for(shape)
        references = ((recipe.target,) if recipe.target is not None else ()) + recipe.sources
        keys = tuple(self._key(which, identity, reference, size) for reference in references)
        loaded = [loader.load(reference, size) for reference in references] if pictures else []
        target = loaded.pop(0) if pictures and recipe.target is not None else None
        prompt = recipe.prompt
        if recipe.task == "infill":
            prompt = with_gaps(recipe.target_text or "", rng, self.whole)
        return Sample(
            recipe.task,
            prompt,
            tuple(loaded),
            target_image=target,
            target_text=recipe.target_text,
            kind=recipe.kind,
            pair_id=_pair_id(which, identity) if recipe.paired else None,
            meta={"caption": recipe.caption, "pictures": keys, "size": size, "source": which},
        )

    def _shape(self, which: int, identity: str, recipe: Recipe, loader: PictureLoader) -> Size:
        source = self.sources[which]
        if isinstance(source, LocalSource) and source.index.sizes is not None:
            width, height = source.index.sizes[int(identity)]
            if width and height:
                return int(width), int(height)
        return loader.size(recipe.deciding_picture)

    def _key(self, which: int, identity: str, reference: Any, size: Size) -> str:
        """Identity of a picture as the model sees it."""
        name = reference if isinstance(reference, str) else hashlib.sha256(_bytes(reference)).hexdigest()
        return f"{getattr(self.sources[which], 'fingerprint', '')[:16]}:{name}:{size[0]}x{size[1]}"

    def epoch_length(self, task: str) -> int | None:
        """Numbers of a task after which every local row has come once; ``None`` where a source has no end."""
        lengths = []
        for which in range(len(self.specs)):
            order = self._orders.get((which, task))
            if order is not None:
                quota = self._quotas[task]
                lengths.append(-(-order.epoch_length * quota.period // quota.counts[which]))
            elif self._quotas[task].counts[which] and not isinstance(self.sources[which], LocalSource):
                return None
        return max(lengths)

    def every(self, task: str, pictures: bool = True) -> Iterator[Sample]:
        """Every usable sample of a task in the local sources, in their own order, whatever the weights."""
        for which, source in enumerate(self.sources):
            if isinstance(source, LocalSource):
                for number in source.numbers(task, self.split).tolist():
                    yield from self.of_row(which, number, (task,), pictures)

    def of_row(self, which: int, number: int, tasks: Sequence[str], pictures: bool = True) -> Iterator[Sample]:
        """Every usable sample that one row of a local source can become."""
        source = self.sources[which]
        try:
            row = renamed(source.rows.row(number), self.specs[which].columns)
            recipes = [recipe for recipe in read_row(row, self.specs[which].tasks) if recipe.task in tasks]
        except InputError:
            return
        for recipe in recipes:
            rng = np.random.default_rng((self.seed, which, number))
            try:
                made = self._build(recipe, which, str(number), rng, pictures)
            except InputError as error:
                self.quarantine.bad(BadRow(source.name, source.rows.label(number), str(error)))
                continue
            if pictures:  # a row is judged by its pictures, once
                self.quarantine.good()
            yield made

    def texts(self, limit: int) -> Iterator[str]:
        """Up to ``limit`` prompts and target texts, for training a tokenizer; pictures stay closed."""
        given = 0
        for number in range(limit):
            for task in self.chunks:
                if given >= limit:
                    return
                try:
                    sample, _ = self.bare(task, number)
                except BadRow:
                    continue
                for text in (sample.prompt, sample.target_text):
                    if text:
                        given += 1
                        yield text.replace(GAP, "")


def _bytes(reference: Any) -> bytes:
    if isinstance(reference, Mapping):
        reference = reference.get("bytes") or str(reference.get("path"))
    return reference if isinstance(reference, bytes) else str(reference).encode()


def _pair_id(which: int, identity: str) -> int:
    digest = hashlib.blake2b(f"{which}:{identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def with_gaps(text: str, rng: np.random.Generator, whole: Callable[[str], bool] | None = None) -> str:
    """A text with some of its words replaced by ``[MASK]``; punctuation stays.

    Args:
        text: The full text.
        rng: Chooses the words.
        whole: Says whether a word can be a gap.

    Raises:
        InputError: no word can.
    """
    words = text.split()
    cores = [word.rstrip(".,;:?!") for word in words]
    able = [i for i, core in enumerate(cores) if core.isalnum() and (whole is None or whole(core))]
    if not able:
        raise InputError("no word of the text is a single token, so none can be a gap")
    share = 0.15 + 0.35 * rng.random()
    gaps = [i for i in able if rng.random() < share] or [able[int(rng.integers(len(able)))]]
    for i in gaps:
        words[i] = GAP + words[i][len(cores[i]) :]
    return " ".join(words)
