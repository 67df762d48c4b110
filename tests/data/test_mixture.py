"""Own data as samples: pure functions of a number, whole epochs, held-out rows, buckets, weights, bad rows, streams."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from unialignment.data.mixture import DataSettings, SourceSpec, UserStream, with_gaps
from unialignment.data.quarantine import BadRow, Quarantine, read_list
from unialignment.errors import AssetError, InputError

SMALL = DataSettings(resolution=8, held_out=0.0)
Manifest = Callable[..., Path]


def value(sample) -> int:
    """The row that a grey picture came from."""
    picture = sample.target_image if sample.target_image is not None else sample.sources[0]
    return int(picture[0, 0, 0])


def stream(path: Path | str, chunks=None, settings=SMALL, **options) -> UserStream:
    spec = path if isinstance(path, list) else [SourceSpec(str(path))]
    return UserStream(spec, settings, chunks or {"generate": 4, "caption": 4}, **options)


def test_an_epoch_sees_every_row_and_pairs_meet(grey_manifest: Manifest) -> None:
    data = stream(grey_manifest(20), {"generate": 4, "caption": 2})
    drawn = [data.sample("generate", number) for number in range(40)]
    assert sorted(map(value, drawn[:20])) == sorted(map(value, drawn[20:])) == list(range(20))
    for number in range(20):
        caption = data.sample("caption", number)
        assert caption.target_text == drawn[number].prompt and caption.pair_id == drawn[number].pair_id
        assert value(caption) == value(drawn[number])
    assert len({sample.pair_id for sample in drawn[:20]}) == 20
    assert drawn[0].target_image.shape == (8, 8, 3)
    again = stream(grey_manifest(20), {"generate": 4, "caption": 2})
    assert [value(again.sample("generate", n)) for n in (33, 2, 17)] == [value(drawn[n]) for n in (33, 2, 17)]
    other = stream(grey_manifest(20), seed=1)
    assert [value(other.sample("generate", n)) for n in range(20)] != list(map(value, drawn[:20]))


def test_held_out_rows_are_never_trained_on(grey_manifest: Manifest) -> None:
    settings = DataSettings(resolution=8, held_out=0.2)
    path = grey_manifest(60)
    train, held = (stream(path, settings=settings, split=split) for split in ("train", "held_out"))
    ours = {value(train.sample("generate", n)) for n in range(train.epoch_length("generate"))}
    theirs = {value(held.sample("caption", n)) for n in range(held.epoch_length("caption"))}
    assert ours | theirs == set(range(60)) and not ours & theirs
    assert 4 <= len(theirs) <= 22
    few = grey_manifest(3)
    assert stream(few, settings=settings, split="held_out").epoch_length("generate") == 1
    assert stream(few, settings=settings).epoch_length("generate") == 2
    with pytest.raises(AssetError, match=r"data\.held_out above 0"):
        stream(few, split="held_out")


def test_sources_are_mixed_by_weight(grey_manifest: Manifest, examples: Path) -> None:
    sources = [
        SourceSpec(str(grey_manifest(6)), weight=3),
        SourceSpec(str(examples / "text-image" / "manifest.jsonl"), weight=1),
        SourceSpec(str(examples / "editing" / "manifest.jsonl")),
    ]
    data = stream(sources, {"generate": 4, "edit": 2})
    found = Counter(data.bare("generate", n)[0].meta["source"] for n in range(512))
    assert found == {0: 384, 1: 128}
    assert {data.bare("edit", n)[0].meta["source"] for n in range(8)} == {2}


def test_tasks_that_nobody_serves_are_named(grey_manifest: Manifest) -> None:
    with pytest.raises(AssetError, match="for the task 'edit': the sources serve caption, generate, infill"):
        stream(grey_manifest(3), {"edit": 1})
    only = [SourceSpec(str(grey_manifest(3)), tasks=("caption",))]
    with pytest.raises(AssetError, match="for the task 'generate'"):
        stream(only, {"generate": 1})
    with pytest.raises(AssetError, match="no data at"):
        stream("nowhere.jsonl")


def test_buckets_keep_shapes_and_fill_micro_batches(grey_manifest: Manifest) -> None:
    settings = DataSettings(resolution=16, buckets=True, bucket_step=4, held_out=0)
    path = grey_manifest(30, sizes=((12, 12), (24, 12), (12, 24)))
    data = stream(path, {"generate": 4, "caption": 4}, settings)
    shapes = []
    for block in range(data.epoch_length("generate") // 4):
        samples = [data.sample(task, 4 * block + slot) for task in ("generate", "caption") for slot in range(4)]
        found = {(s.target_image if s.task == "generate" else s.sources[0]).shape for s in samples}
        assert len(found) == 1
        shapes.append(found.pop())
    assert len(set(shapes)) == 3
    for height, width, _ in shapes:
        assert height % 4 == width % 4 == 0 and 0.7 < height * width / 256 < 1.3
    substitute = data.sample("generate", 0, attempt=1)
    assert substitute.target_image.shape == shapes[0] and value(substitute) != value(data.sample("generate", 0))


def test_pictures_without_sizes_are_measured_upright(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": "a.jpg", "text": "a"}) + "\n")
    data = stream(tmp_path / "m.jsonl", {"generate": 1}, DataSettings(16, True, 4, held_out=0))
    height, width, _ = data.sample("generate", 0).target_image.shape
    assert height > width


def test_bad_rows_are_skipped_counted_and_listed(grey_manifest: Manifest, tmp_path: Path) -> None:
    path = grey_manifest(40, broken=(3, 20))
    lines = path.read_text().splitlines()
    lines[5], lines[6] = "{not json", json.dumps({"image": "missing.png", "caption": "x"})
    path.write_text("\n".join(lines) + "\n")
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.1)
    data = stream(path, quarantine=quarantine)
    refused = 0
    for number in range(78):
        try:
            assert value(data.sample("generate", number)) not in (3, 5, 6, 20)
        except BadRow:
            refused += 1
            substitute = data.sample("generate", number, attempt=1)
            assert value(substitute) not in (3, 5, 6, 20)
    assert refused == 6 and quarantine.refused == 6  # the line that is no JSON is left out from the start
    listed = read_list(tmp_path / "q.jsonl")
    assert listed == {("grey/manifest.jsonl", f"manifest.jsonl:{line}") for line in (4, 6, 7, 21)}
    assert (tmp_path / "q.jsonl").read_text().count("\n") == 4
    clean = stream(path, excluded=tmp_path / "q.jsonl")
    assert clean.epoch_length("generate") == 36
    assert sorted(value(clean.sample("generate", n)) for n in range(36)) == sorted(set(range(40)) - {3, 5, 6, 20})


def test_too_many_bad_rows_stop_the_run(grey_manifest: Manifest, tmp_path: Path) -> None:
    data = stream(grey_manifest(40, broken=tuple(range(10))), quarantine=Quarantine(tmp_path / "q", 0.1, grace=20))
    with pytest.raises(AssetError, match=r"more than data\.max_bad=0\.1 allows; they are listed in .*q\. The last"):
        for number in range(40):
            try:
                data.sample("generate", number)
            except BadRow:
                continue


def test_going_through_every_row_judges_the_share_of_bad_ones(grey_manifest: Manifest) -> None:
    few = Quarantine(limit=0.2, grace=20)  # as for teachers and feature caches
    assert len(list(stream(grey_manifest(60, broken=tuple(range(1, 60, 6))), quarantine=few).every("generate"))) == 50
    assert (few.read, few.refused) == (60, 10)
    many = stream(grey_manifest(60, broken=tuple(range(1, 41))), quarantine=Quarantine(limit=0.2, grace=5))
    with pytest.raises(AssetError, match=r"more than data\.max_bad=0\.2"):
        list(many.every("generate"))


def test_decompression_bombs_are_refused_by_their_header(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (3000, 3000)).save(tmp_path / "bomb.png")
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": "bomb.png", "text": "a"}) + "\n")
    data = stream(tmp_path / "m.jsonl", {"generate": 1}, DataSettings(8, max_pixels=1_000_000, held_out=0))
    with pytest.raises(BadRow, match="more than the limit of 1,000,000"):
        data.sample("generate", 0)


def test_urls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": "https://example.org/a.png", "text": "a"}) + "\n")
    with pytest.raises(BadRow, match="is a URL"):
        stream(tmp_path / "m.jsonl", {"generate": 1}).sample("generate", 0)


def test_gaps_are_words_that_may_be_gaps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        text = with_gaps("a red dog, left of a cat.", rng, lambda word: word in ("dog", "cat"))
        assert (
            "[MASK]" in text
            and text.replace("[MASK],", "dog,").replace("[MASK].", "cat.") == "a red dog, left of a cat."
        )
    with pytest.raises(InputError, match="no word"):
        with_gaps("a dog", rng, lambda word: False)


def test_own_column_names(tmp_path: Path, grey_manifest: Manifest) -> None:
    folder = grey_manifest(2).parent
    (folder / "m.jsonl").write_text(json.dumps({"file": "1.png", "beschreibung": "grau"}) + "\n")
    spec = SourceSpec(str(folder / "m.jsonl"), columns={"image": "file", "caption": "beschreibung"})
    assert stream([spec], {"generate": 1}).sample("generate", 0).prompt == "grau"


# ---------------------------------------------------------------------------------------------- other formats


def test_tars_parquet_and_saved_data_sets_give_the_same_rows(grey_tars: Callable[..., Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pattern = grey_tars(2, 5)
    tars = stream(pattern)
    expected = [value(tars.sample("generate", n)) for n in range(10)]
    assert sorted(expected) == list(range(10))
    assert tars.sample("caption", 3).target_text == f"picture {expected[3]}"
    whole = datasets.load_dataset("webdataset", data_files=[str(f) for f in sorted(pattern.parent.glob("*.tar"))])[
        "train"
    ]
    whole = whole.rename_columns({"png": "image", "txt": "caption"}).select_columns(["image", "caption"])
    whole.to_parquet(tmp_path / "rows.parquet")
    whole.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        data = stream(path)
        assert [value(data.sample("generate", n)) for n in range(10)] == expected


def test_a_saved_data_set_of_several_splits_is_recognised(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": ["a.png"] * 3, "caption": ["a", "b", "c"]})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "saved")
    assert len(stream(tmp_path / "saved").sources[0].rows) == 3
    assert len(stream([SourceSpec(str(tmp_path / "saved"), split="test")]).sources[0].rows) == 1


def test_a_missing_library_is_named_rather_than_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"x")
    with pytest.raises(AssetError, match=r"unialignment\[train\]"):
        stream(tmp_path / "rows.parquet")


def test_an_unreadable_shard_costs_its_own_rows_only(grey_tars: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pattern = grey_tars(3, 4)
    broken = pattern.parent / "shard-001.tar"
    broken.write_bytes(b"no tar at all" * 100)
    data = stream(pattern, quarantine=Quarantine(tmp_path / "q.jsonl", 0.1))
    assert sorted(value(data.sample("generate", n)) for n in range(8)) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert read_list(tmp_path / "q.jsonl") == {("tars/*.tar", "shard-001.tar")}
    for file in pattern.parent.glob("*.tar"):
        file.write_bytes(b"nothing")
    with pytest.raises(AssetError, match="none of the 3 files"):
        stream(pattern)


def streamed(pattern: Path, bookmarks: Path | None = None, **options) -> UserStream:
    settings = DataSettings(resolution=8, held_out=0.0, shuffle_block=5)
    spec = [SourceSpec(str(pattern), streaming=True)]
    return UserStream(spec, settings, {"generate": 2, "caption": 2}, bookmarks=bookmarks, **options)


def test_a_stream_is_a_function_of_position_with_and_without_bookmarks(
    grey_tars: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    pattern = grey_tars(3, 8)
    marks = tmp_path / "marks"
    data = streamed(pattern, marks)
    rows = [value(data.sample("generate", n)) for n in range(72)]
    # 3 lanes of one shard each: 24 rows an epoch, lane by lane in blocks that may cross an epoch's end.
    assert set(rows[:60]) == set(range(24)) and max(Counter(rows).values()) <= 4
    assert [value(data.sample("caption", n)) for n in range(72)] == rows
    assert list(marks.iterdir())
    for start in (50, 13):
        for folder in (marks, None):
            resumed = streamed(pattern, folder)
            assert [value(resumed.sample("generate", n)) for n in range(start, start + 20)] == rows[start : start + 20]
    for file in marks.iterdir():  # cut short by a kill
        file.write_text(file.read_text()[:-7])
    again = streamed(pattern, marks)
    assert [value(again.sample("generate", n)) for n in range(60, 72)] == rows[60:]


def test_a_stream_goes_on_past_an_unreadable_shard(grey_tars: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pattern = grey_tars(2, 4)
    (pattern.parent / "shard-000.tar").write_bytes(b"junk" * 500)
    data = streamed(pattern, quarantine=Quarantine(tmp_path / "q.jsonl", 0.5))
    assert {value(data.sample("generate", n)) for n in range(24)} == {4, 5, 6, 7}
    assert read_list(tmp_path / "q.jsonl") == {("tars/*.tar", "shard-000.tar")}
    for file in pattern.parent.glob("*.tar"):
        file.write_bytes(b"junk" * 500)
    with pytest.raises(AssetError, match="no usable row in the last"):
        streamed(pattern).sample("generate", 0)


def test_rows_of_a_stream_without_a_layout_are_each_listed(tmp_path: Path, examples: Path) -> None:
    pytest.importorskip("datasets")
    image = str(examples / "text-image" / "images" / "red-circle.png")
    rows = [{"image": image, ("note" if row in (2, 5) else "caption"): f"row {row}"} for row in range(8)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = streamed(tmp_path / "m.jsonl", tmp_path / "marks", quarantine=Quarantine(tmp_path / "q.jsonl"))
    assert [data.sample("generate", n).prompt for n in range(20)]
    assert {row for _, row in read_list(tmp_path / "q.jsonl")} == {"m.jsonl:3", "m.jsonl:6"}
    resumed = streamed(tmp_path / "m.jsonl", tmp_path / "marks", quarantine=Quarantine(tmp_path / "again.jsonl"))
    assert resumed.sample("generate", 15).prompt == data.sample("generate", 15).prompt
    assert {row for _, row in read_list(tmp_path / "again.jsonl")} <= {"m.jsonl:3", "m.jsonl:6"}


def test_streams_cannot_hold_out(grey_tars: Callable[..., Path]) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(AssetError, match=r"name others in data\.validation"):
        streamed(grey_tars(1, 2), split="held_out")
