from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unialignment.errors import CheckpointError, StorageError
from unialignment.model.checkpoints import (
    WEIGHTS_NAME,
    find_weights,
    load_state_dict,
    load_tensors,
    load_weights,
    save_tensors,
)


def module(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_weights_survive_the_file(tmp_path: Path):
    save_tensors(module(0).state_dict(), tmp_path / WEIGHTS_NAME)
    for path in (tmp_path, tmp_path / WEIGHTS_NAME):
        other = module(1)
        load_weights(other, path)
        assert same(other, module(0))
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_NAME]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_loads_into_float32(tmp_path: Path, dtype: torch.dtype):
    save_tensors({k: v.to(dtype) for k, v in module(0).state_dict().items()}, tmp_path / WEIGHTS_NAME)
    other = module(1)
    load_weights(other, tmp_path)
    for name, value in other.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, module(0).state_dict()[name].to(dtype).float(), rtol=0, atol=0)


def test_shared_tensors_are_stored(tmp_path: Path):
    weight = torch.arange(6.0).reshape(2, 3)
    save_tensors({"a": weight, "b": weight, "c": weight.T}, tmp_path / "x.safetensors")
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(loaded["b"], weight)
    assert torch.equal(loaded["c"], weight.T)


def damage(state: dict[str, torch.Tensor], how: str) -> None:
    if how == "missing":
        del state["0.weight"]
    elif how == "unexpected":
        state["surplus"] = torch.zeros(1)
    elif how == "shape":
        state["2.bias"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"1 missing \(0\.weight\)"),
        ("unexpected", r"unexpected \(surplus\)"),
        ("shape", r"\[7\] instead of \[2\]"),
    ],
)
@pytest.mark.parametrize("route", ["file", "state"])
def test_tensors_that_do_not_fit_are_named_and_the_module_untouched(tmp_path: Path, how: str, words: str, route: str):
    state = dict(module(0).state_dict())
    damage(state, how)
    target = module(1)
    save_tensors(state, tmp_path / WEIGHTS_NAME)
    load = {"file": lambda: load_weights(target, tmp_path), "state": lambda: load_state_dict(target, state)}[route]
    with pytest.raises(CheckpointError, match=words) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert same(target, module(1))


def test_long_lists_of_names_are_cut(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"30 unexpected .* and 26 more") as caught:
        load_state_dict(module(), {**module().state_dict(), **{f"x{i}": torch.zeros(1) for i in range(30)}})
    assert len(str(caught.value)) < 400


def shards(folder: Path) -> None:
    state = module(0).state_dict()
    names = sorted(state)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": files}))


def test_shards_are_joined(tmp_path: Path):
    shards(tmp_path)
    other = module(1)
    load_weights(other, tmp_path)
    assert same(other, module(0))


def test_a_half_download_is_recognised(tmp_path: Path):
    shards(tmp_path)
    (tmp_path / "part-1.safetensors").rename(tmp_path / "part-1.incomplete")
    with pytest.raises(CheckpointError, match=r"1 of 2 weight files .*part-1"):
        find_weights(tmp_path)
    (tmp_path / "part-1.incomplete").rename(tmp_path / "part-1.safetensors")
    data = (tmp_path / "part-0.safetensors").read_bytes()
    for length in (0, 5, 40, len(data) - 3):
        (tmp_path / "part-0.safetensors").write_bytes(data[:length])
        target = module(1)
        with pytest.raises(CheckpointError, match=r"part-0\.safetensors.* (truncated|empty)") as caught:
            load_weights(target, tmp_path)
        assert "\n" not in str(caught.value)
        assert same(target, module(1))


def test_an_index_cannot_lead_outside_its_folder(tmp_path: Path):
    (tmp_path / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        find_weights(tmp_path)


class Attack:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("name", ["model.bin", "model.pth", "model.ckpt", "model.pt", WEIGHTS_NAME])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(pickle.dumps(Attack()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="pickle"):
            load_weights(module(), path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="pickle"):
        load_weights(module(), tmp_path / name)


def test_pickled_tensors_load_only_when_asked_and_never_code(tmp_path: Path):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": module(0).state_dict()}, path)
    with pytest.raises(CheckpointError, match="pickle"):
        load_tensors(path)
    target = module(1)
    load_state_dict(target, load_tensors(path, allow_pickle_tensors=True))
    assert same(target, module(0))
    for write in (lambda: torch.save(Attack(), path), lambda: path.write_bytes(pickle.dumps(Attack()))):
        write()
        with pytest.raises(CheckpointError, match="may be code"):
            load_tensors(path, allow_pickle_tensors=True)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path):
    (tmp_path / WEIGHTS_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        find_weights(tmp_path)


def test_a_full_disk_keeps_the_old_weights(tmp_path: Path):
    path = tmp_path / WEIGHTS_NAME
    save_tensors(module(0).state_dict(), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match="could not write") as caught:
            save_tensors({"large": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
