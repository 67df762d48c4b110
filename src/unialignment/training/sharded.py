"""Checkpoints of which every process writes its own shards, through ``torch.distributed.checkpoint``.

They lie in the same folders, under the same rules (complete or absent, checksums, ``latest``) as those of one process,
and either kind can be read by any number of processes. Knows nothing of what the tensors mean.

Shards are safetensors no longer: ``torch.distributed.checkpoint`` keeps its index as a pickle. Resume only runs of
your own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unialignment.errors import CheckpointError, StorageError
from unialignment.model.folders import file_checksum
from unialignment.storage import atomic_folder, storage_error, write_json
from unialignment.training.checkpoint import MANIFEST, SHARDS, STATE, TENSORS, CheckpointStore, read_tensors
from unialignment.training.parallel import Parallel, place_like

Like = Callable[[str, torch.Size], Tensor | None]
"""By name and shape: the tensor of the run that a stored one is for, or ``None``."""


def write_shards(tensors: dict[str, Tensor], folder: Path, parallel: Parallel) -> None:
    """Every process writes its part. Separate so that tests can make it fail."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    dcp.save(dict(tensors), storage_writer=writer, process_group=parallel.control)


def save_sharded(
    store: CheckpointStore, step: int, tensors: dict[str, Tensor], state: dict[str, Any], parallel: Parallel
) -> Path:
    """Like :meth:`CheckpointStore.save`, by all processes together.

    Raises:
        StorageError: one of them could not write; earlier checkpoints are intact and still the latest. Raised in all.
    """
    from torch.distributed.checkpoint import CheckpointException

    final = store.place(step)
    with contextlib.ExitStack() as stack:
        opened, trouble = "", ""
        if parallel.is_main:
            try:
                store.remove_partials()
                opened = str(stack.enter_context(atomic_folder(final)))
            except StorageError as error:
                trouble = str(error)
        opened, trouble = parallel.broadcast((opened, trouble))
        manifest: dict[str, Any] = {}
        if not trouble:
            partial = Path(opened)
            try:
                write_shards(tensors, partial / SHARDS, parallel)
                own = [*(partial / SHARDS).glob(f"__{parallel.rank}_*")]
                if parallel.is_main:
                    write_json(partial / STATE, {"step": step, **state})
                    own += [partial / SHARDS / ".metadata", partial / STATE]
                manifest = {
                    str(f.relative_to(partial)): {"bytes": f.stat().st_size, "sha256": file_checksum(f)} for f in own
                }
            except StorageError as error:
                trouble = str(error)
            except (Exception, CheckpointException) as error:  # the latter, no Exception, holds what each process met
                trouble = str(storage_error(partial / SHARDS, _cause(error)))
        everyone = parallel.gather((manifest, trouble))
        troubles = [each for _, each in everyone if each]
        if troubles:
            raise store.failed(step, troubles[0])
        if parallel.is_main:
            files = {name: facts for each, _ in everyone for name, facts in each.items()}
            try:
                write_json(Path(opened) / MANIFEST, files)
                stack.close()  # renames
            except StorageError as error:
                trouble = str(error)
        if trouble := parallel.broadcast(trouble):
            raise store.failed(step, trouble)
    parallel.on_main(lambda: store.announce(step))
    return final


def _cause(error: BaseException) -> BaseException:
    """The write error inside a CheckpointException."""
    failures = getattr(error, "failures", None) or {}
    for wrapped in failures.values():
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        if isinstance(inner, BaseException):
            return inner
    return error


def load_tensors(folder: Path, like: Like, parallel: Parallel) -> dict[str, Tensor]:
    """A checkpoint's tensors of either kind, placed as the run's own are.

    Args:
        folder: An intact checkpoint.
        like: Says how each is to be placed; where it says ``None``, the tensor comes whole.
        parallel: The processes; all must call this.

    Raises:
        CheckpointError: it can't be read.
    """
    if (folder / TENSORS).is_file():
        whole = read_tensors(folder)
        result = {}
        for name, value in whole.items():
            model = like(name, value.shape)
            result[name] = value if model is None else place_like(value, model)
        return result
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import CheckpointException

    reader = dcp.FileSystemReader(folder / SHARDS)
    wanted: dict[str, Tensor] = {}
    try:
        for name, facts in reader.read_metadata().state_dict_metadata.items():
            size, dtype = facts.size, facts.properties.dtype  # type: ignore[union-attr]
            model = like(name, size)
            if model is None or model.shape != size:
                wanted[name] = torch.empty(size, dtype=dtype)
            else:
                wanted[name] = torch.empty_like(model, dtype=dtype, requires_grad=False)
        dcp.load(
            wanted,
            storage_reader=reader,
            process_group=parallel.control,
            **({"no_dist": True} if parallel.kind == "none" else {}),
        )
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"cannot read the shards in {folder}: {error}") from error
    return wanted
