"""SemGen-Bench (arXiv 2509.23760) from a folder, a zip file or a hub id: 150 photographs, four groups.

Everything in it is checked before it is used: rows, paths that lead out of the folder, archives that lie about their
size. Knows nothing of models, judges or scores.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from unialignment.errors import AssetError, InputError
from unialignment.evaluation.benchmarks import Benchmark, Item
from unialignment.evaluation.records import digest
from unialignment.model.folders import file_checksum
from unialignment.storage import atomic_folder

INDEX = "semgen_bench.jsonl"
GROUPS = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")
ROWS = 150
TURNS = ("one", "three")

MAX_MEMBERS = 10_000
MAX_BYTES = 2 * 2**30
MAX_RATIO = 200
"""Limits on archives: files, bytes after unpacking, and bytes after unpacking per byte before."""
_ENDINGS = {".jsonl", ".jpg", ".jpeg", ".png", ".webp", ".md", ".txt", ".json", ".py", ""}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s*(?=[A-Z])")


def load(source: str | Path, *, turns: str = "one", cache: Path | None = None) -> Benchmark:
    """Read the benchmark.

    Args:
        source: A folder that holds ``semgen_bench.jsonl``, a zip file of one, or a dataset's hub id.
        turns: ``"one"``: ``edit_multi`` is one instruction, as published; ``"three"``: its clauses follow one another.
        cache: Where archives are unpacked; a folder in the user's cache unless given.

    Raises:
        InputError: It is not the benchmark, or damaged.
        AssetError: It can't be downloaded.
    """
    if turns not in TURNS:
        raise InputError(f"turns must be one of {', '.join(TURNS)}, got {turns!r}")
    root = _find(source, cache)
    index = root / INDEX
    rows = _rows(index)
    parts: list[str] = []
    by_group: dict[str, list[Item]] = {group: [] for group in GROUPS}
    for number, row in enumerate(rows):
        photo = _photo(root, row["image_path"], number + 1)
        parts += [json.dumps(row, sort_keys=True, ensure_ascii=False), file_checksum(photo)]
        for place, group in enumerate(GROUPS):
            text = row[group].strip()
            by_group[group].append(
                Item(
                    id=f"{group}/{row['image_id']}",
                    group=group,
                    kind="edit" if group.startswith("edit") else "generate",
                    prompt=text,
                    turns=clauses(text) if group == "edit_multi" and turns == "three" else (text,),
                    photo=photo,
                    offset=place * 1_000_000 + number,
                )
            )
    items = tuple(item for group in GROUPS for item in by_group[group])
    return Benchmark("SemGen-Bench", GROUPS, items, digest(*parts))


def clauses(instruction: str) -> tuple[str, ...]:
    """The sentences of an instruction; the published ones stand together without a space."""
    return tuple(part.strip() for part in _SENTENCE.split(instruction) if part.strip())


def _rows(index: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    try:
        lines = index.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"could not read {index}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{index.name}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error}); get the file again") from error
        wanted: dict[str, type] = {"image_id": int, "image_path": str, **dict.fromkeys(GROUPS, str)}
        for name, kind in wanted.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not value.strip()):
                raise InputError(f"{where}: expected {name!r} to be a {kind.__name__}, got {value!r}")
        if row["image_id"] in seen:
            raise InputError(f"{where}: image_id {row['image_id']} occurs twice")
        seen.add(row["image_id"])
        rows.append(row)
    if not rows:
        raise InputError(f"{index} holds no rows; expected {ROWS}")
    return rows


def _photo(root: Path, name: str, number: int) -> Path:
    path = (root / name).resolve()
    if Path(name).is_absolute() or "\\" in name or not path.is_relative_to(root.resolve()):
        raise InputError(f"{INDEX}, row {number}: {name!r} leads out of the benchmark's folder; expected images/NAME")
    if not path.is_file():
        raise InputError(f"{INDEX}, row {number}: there is no picture {name!r} beside it; get the images too")
    return path


def _find(source: str | Path, cache: Path | None) -> Path:
    text = str(source)
    path = Path(text).expanduser()
    if path.is_dir():
        return _root(path)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise InputError(f"{text} is a file but no zip archive; give the benchmark's folder or zip file")
        return _unpack(path, cache or _cache())
    if path.suffix == ".zip" or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise InputError(f"no SemGen-Bench at {text!r}: not a folder that holds {INDEX}, nor a zip file, nor a hub id")
    return _root(_download(text))


def _root(folder: Path) -> Path:
    found = [folder] if (folder / INDEX).is_file() else [path.parent for path in sorted(folder.glob(f"*/{INDEX}"))]
    if len(found) != 1:
        raise InputError(f"{folder} holds no {INDEX} (with images/ beside it); give the folder of the benchmark")
    return found[0]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unialignment" / "benchmarks"


def _unpack(archive: Path, cache: Path) -> Path:
    destination = cache / f"{archive.stem[:40]}-{file_checksum(archive)[:16]}"
    if not destination.is_dir():
        try:
            with zipfile.ZipFile(archive) as file, atomic_folder(destination) as folder:
                for member in _checked(file, archive):
                    _extract(file, member, folder, archive)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise InputError(f"{archive} is damaged or of an unknown kind ({error}); get it again") from error
    return _root(destination)


def _checked(file: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    members = [member for member in file.infolist() if not member.is_dir()]
    if len(members) > MAX_MEMBERS:
        raise InputError(f"{archive} holds {len(members):,} files, at most {MAX_MEMBERS:,} are unpacked")
    total = sum(member.file_size for member in members)
    packed = max(1, archive.stat().st_size)
    if total > MAX_BYTES or total / packed > MAX_RATIO:
        raise InputError(f"{archive} would unpack to {total:,} bytes from {packed:,}; refused, this is no benchmark")
    kept = []
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename:
            raise InputError(f"{archive}: the entry {member.filename[:80]!r} leads out of the archive; refused")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{archive}: the entry {member.filename[:80]!r} is a link; refused")
        if "__MACOSX" not in name.parts and name.suffix.lower() in _ENDINGS:
            kept.append(member)
    return kept


def _extract(file: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, archive: Path) -> None:
    target = folder / member.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with file.open(member) as reader, target.open("wb") as writer:
        while chunk := reader.read(2**20):
            size += len(chunk)
            if size > member.file_size:  # a header may lie; what counts is what comes out
                raise InputError(f"{archive}: {member.filename[:80]!r} is larger than the archive says; refused")
            writer.write(chunk)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                hub_id, repo_type="dataset", allow_patterns=["*.jsonl", "*.jpg", "*.jpeg", "*.png", "*.md"]
            )
        )
    except Exception as error:  # the hub client raises its own, requests' or httpx' errors, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AssetError(
            f"no folder {hub_id!r} here, and downloading it as a dataset from the hub failed ({reason[:160]}); "
            "check the name and the network, or give a folder or zip file"
        ) from error
