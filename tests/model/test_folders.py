from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unialignment.errors import CheckpointError
from unialignment.model.checkpoints import WEIGHTS_NAME, save_tensors
from unialignment.model.folders import resolve_model, verify_checksums, write_checksums


def test_checksums_reveal_damage_and_loss(tmp_path: Path):
    assert verify_checksums(tmp_path) is False
    path = tmp_path / "transformer" / WEIGHTS_NAME
    save_tensors({"weight": torch.arange(3.0)}, path)
    write_checksums(tmp_path)
    assert verify_checksums(tmp_path) is True
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        verify_checksums(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        verify_checksums(tmp_path)


def test_models_are_found_by_path_and_missing_ones_explained(tmp_path: Path):
    assert resolve_model(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    for name, words in [
        (tmp_path / "absent", "no model"),
        (tmp_path / "file", "is a file"),
        ("nanno", "no model 'nanno'"),
        ("", "empty"),
        ("../../no-such-model-folder", "no model"),
        ("nobody/no-such-model", "network"),
    ]:
        with pytest.raises(CheckpointError, match=words) as caught:
            resolve_model(name)
        assert "\n" not in str(caught.value)
