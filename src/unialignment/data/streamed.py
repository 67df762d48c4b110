"""Rows of streamed data: read forward only, yet the row at a position is always the same.

Shards are dealt to lanes, anew in every epoch; a position is a lane and an offset in it. Rows are shuffled within
blocks, so that no hidden buffer has to be saved: a block is a pure function of where it begins. Where blocks begin is
written down (bookmarks), which makes seeking after a restart quick; without bookmarks the lane is read from its start,
with the same result. Knows nothing of tasks beyond a filter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unialignment.data.order import permuted
from unialignment.data.quarantine import BadRow, Quarantine
from unialignment.data.rows import _reason, find_files, guess_format, load_library, source_name
from unialignment.errors import AssetError

MAX_LANES = 64

_LIBRARY_NAMES = {"jsonl": "json", "parquet": "parquet", "webdataset": "webdataset"}

Row = Mapping[str, Any]
Filter = Callable[[Row, str], bool]
"""Says of a row, and of where it is (shard and number), whether it is of use."""


def open_shards(path: str, format: str, split: str) -> tuple[list[str], list[Callable[[], Any]]]:
    """Labels of a source's shards, and functions that open each as an ``IterableDataset``.

    Raises:
        AssetError: nothing is there.
    """
    library = load_library()
    chosen = guess_format(path) if format == "auto" else format
    if chosen != "dataset":

        def opener(file: Path) -> Callable[[], Any]:
            return lambda: library.load_dataset(
                _LIBRARY_NAMES[chosen], data_files=[str(file)], split="train", streaming=True
            ).decode(False)

        files = find_files(path)
        return [file.name for file in files], [opener(file) for file in files]
    folder = Path(path).expanduser()
    try:
        if (folder / "state.json").is_file():
            stored = library.load_from_disk(str(folder))
            whole = stored.to_iterable_dataset(num_shards=min(MAX_LANES, max(1, len(stored) // 1000)))
        else:
            whole = library.load_dataset(str(path), split=split, streaming=True)
        whole = whole.decode(False)
        count = int(whole.num_shards)
    except Exception as error:  # the library raises many kinds, network ones included
        raise AssetError(f"cannot stream the data set {path} (split {split}): {_reason(error)}") from None

    def part(index: int) -> Callable[[], Any]:
        return lambda: whole.shard(num_shards=count, index=index)

    return [f"shard {index}" for index in range(count)], [part(index) for index in range(count)]


class StreamedRows:
    """A streamed source.

    Args:
        path: Files, folder, pattern, or a data set's name.
        format: As for local data.
        split: Of a named data set.
        root: Folder that relative paths of pictures start from.
        seed: Chooses the order.
        block: Rows that are shuffled among one another.
        bookmarks: Folder for bookmarks; ``None``: none are kept.
        quarantine: Told of unreadable shards.

    Raises:
        AssetError: the source can't be opened.
    """

    def __init__(
        self,
        path: str,
        format: str = "auto",
        split: str = "train",
        root: Path | None = None,
        seed: int = 0,
        block: int = 256,
        bookmarks: Path | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.name = source_name(path)
        self.labels, self.openers = open_shards(path, format, split)
        found = Path(path).expanduser()
        self.root = root or (found if found.is_dir() else found.parent)
        self.seed, self.block, self.bookmarks = seed, block, bookmarks
        self.quarantine = quarantine or Quarantine()
        self.lanes = min(len(self.labels), MAX_LANES)
        self.fingerprint = hashlib.sha256(repr((path, self.labels, split)).encode()).hexdigest()
        self._readers: dict[tuple[str, int], _Reader] = {}

    def row(self, group: str, wanted: Filter, lane: int, offset: int, attempt: int = 0) -> Row:
        """The row at a position, among the rows that a group of tasks wants.

        Args:
            group: Names the filter.
            wanted: The filter.
            lane: 0 to ``lanes`` - 1.
            offset: Position in the lane; lanes have no end, an epoch follows the other.
            attempt: Above 0: a substitute from the same block.

        Raises:
            AssetError: a whole epoch of the lane holds no such row, or too many shards are unreadable.
        """
        key = (group, lane)
        if key not in self._readers:
            self._readers[key] = _Reader(self, group, lane, wanted)
        return self._readers[key].row(offset, attempt)


class _Reader:
    """One lane for one filter."""

    def __init__(self, source: StreamedRows, group: str, lane: int, wanted: Filter) -> None:
        self.source, self.lane, self.wanted = source, lane, wanted
        self.length = len(range(lane, len(source.labels), source.lanes))
        identity = repr((source.fingerprint, source.seed, source.block, group, lane))
        self.identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.blocks: dict[int, list[Row]] = {}
        self._begin({"block": 0, "epoch": 0, "place": 0, "state": None, "read": 0})

    def row(self, offset: int, attempt: int) -> Row:
        number, place = divmod(offset, self.source.block)
        if number not in self.blocks:
            if number < self.next or number > self.next + 1:
                mark = self._bookmark(number)
                if number < self.next or int(mark["block"]) > self.next:
                    self._begin(mark)
            while number not in self.blocks:
                self._fill()
        block = self.blocks[number]
        place = (place + 7919 * attempt) % len(block)
        return block[permuted(place, len(block), self.source.seed, self.lane, number)]

    def _begin(self, mark: Mapping[str, Any]) -> None:
        self.next, self.epoch, self.place = int(mark["block"]), int(mark["epoch"]), int(mark["place"])
        self.state, self.read = mark["state"], int(mark.get("read", 0))
        self.rows: Iterator[Row] | None = None
        self.dataset: Any = None
        self.since_hit = 0

    def _fill(self) -> None:
        """Read the next block."""
        self._write_bookmark()
        block: list[Row] = []
        while len(block) < self.source.block:
            row = self._next_row()
            if row is not None and self.wanted(row, self.label):
                self.since_hit = 0
                block.append(row)
        self.blocks[self.next] = block
        self.next += 1
        for old in [number for number in self.blocks if number < self.next - 2]:
            del self.blocks[old]

    def _next_row(self) -> Row | None:
        """The next row; ``None`` where a shard ended."""
        source = self.source
        place = self.lane + self.place * source.lanes
        shard = permuted(place, len(source.labels), source.seed, self.epoch)
        try:
            if self.rows is None:
                self.dataset = source.openers[shard]()
                if self.state is not None:
                    self.dataset.load_state_dict(self.state)
                self.rows = iter(self.dataset)
            row = next(self.rows)
            self.read += 1
            self.label = f"{source.labels[shard]}:{self.read}"
            return row
        except StopIteration:
            pass
        except Exception as error:  # tarfile, pyarrow, network: each raises its own
            source.quarantine.bad(BadRow(source.name, source.labels[shard], f"unreadable shard ({_reason(error)})"))
        self.rows, self.state, self.read = None, None, 0
        self.place += 1
        self.since_hit += 1
        if self.place == self.length:
            self.place, self.epoch = 0, self.epoch + 1
        if self.since_hit > 4 * len(source.labels) + 4:
            raise AssetError(
                f"{source.name}: no usable row in the last {self.since_hit} shards read; check them with "
                "`unialign data check`"
            )
        return None

    # ------------------------------------------------------------------------------------------------ bookmarks

    def _path(self) -> Path | None:
        folder = self.source.bookmarks
        return None if folder is None else folder / f"{self.identity}.jsonl"

    def _write_bookmark(self) -> None:
        path = self._path()
        if path is None or self.next == 0:
            return
        state = self.state if self.rows is None else self.dataset.state_dict()
        mark = {"block": self.next, "epoch": self.epoch, "place": self.place, "state": state, "read": self.read}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(mark) + "\n")
        except (OSError, TypeError):
            pass  # a bookmark only saves time

    def _bookmark(self, number: int) -> Mapping[str, Any]:
        """The last one at or before a block."""
        best: Mapping[str, Any] = {"block": 0, "epoch": 0, "place": 0, "state": None}
        path = self._path()
        if path is None or not path.is_file():
            return best
        for line in path.read_text("utf-8").splitlines():
            try:
                mark = json.loads(line)
                if best["block"] < mark["block"] <= number and {"epoch", "place", "state"} <= mark.keys():
                    best = mark
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut short
        return best
