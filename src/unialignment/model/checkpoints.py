"""Weights in and out of folders: strictly, safely and atomically.

Everything is judged from headers and indexes before a module is touched: names and shapes must match exactly, shards
must all be there, files must be safetensors. Pickles are refused, because loading one runs whatever code its author put
in it. Knows nothing of what the modules compute, of tasks or of training state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from unialignment.errors import CheckpointError, StorageError
from unialignment.storage import storage_error

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
_WEIGHT_FILES = (WEIGHTS_NAME, "model.safetensors")
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def name_list(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


# ------------------------------------------------------------------------------------------------- files to tensors


def open_weights(path: Path) -> Any:
    """Open a safetensors file after checking that it is one.

    Raises:
        CheckpointError: It is missing, empty, damaged, a Git LFS pointer or a pickle.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"could not read weights {path}: {error.strerror or error}") from error
    if size == 0:
        raise CheckpointError(f"weights {path} are empty (0 bytes); download or save them again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.startswith((b"\x80", b"PK\x03\x04")) and not _plausible_header(head, size):
        raise CheckpointError(
            f"{path} is a pickle file, whatever its name, and pickles can run code; ask for safetensors instead"
        )
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"weights {path} are truncated or not safetensors ({reason}); download or save them again"
        ) from error


def _plausible_header(head: bytes, size: int) -> bool:
    # A safetensors file opens with the length of its JSON header, which may by chance look like a pickle's first byte.
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size


def find_weights(path: str | Path) -> dict[str, Path]:
    """Find where each tensor of a component lies.

    Args:
        path: A safetensors file, or a folder with one (``diffusion_pytorch_model.safetensors`` or
            ``model.safetensors``) or with an index of shards beside it.

    Returns:
        Tensor name → file.

    Raises:
        CheckpointError: Nothing is there, a shard is missing, the index is unusable, or only pickles are there.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no weights at {path}; check the path")
    if path.is_file():
        if path.suffix in _PICKLES:
            raise CheckpointError(f"{path} is a pickle file, and pickles can run code; ask for safetensors instead")
        with open_weights(path) as file:
            return dict.fromkeys(file.keys(), path)
    for name in _WEIGHT_FILES:
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return find_weights(path / name)
        if index.is_file():
            return _sharded(index)
    pickles = [file.name for file in path.iterdir() if file.suffix in _PICKLES]
    if pickles:
        raise CheckpointError(
            f"{path} holds only pickle files ({name_list(pickles)}), which can run code; use safetensors"
        )
    raise CheckpointError(
        f"no weights in {path}: expected {' or '.join(_WEIGHT_FILES)}; the download may be incomplete"
    )


def _sharded(index: Path) -> dict[str, Path]:
    data = read_json(index)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise CheckpointError(f"{index} has no usable 'weight_map'; download it again")
    shards = set(weight_map.values())
    if any(Path(shard).name != shard for shard in shards):
        raise CheckpointError(f"{index} names files outside its folder; refused")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} weight files named by {index} are missing ({name_list(missing)}); "
            "the download is incomplete, repeat it"
        )
    for shard in sorted(shards):
        with open_weights(index.parent / shard) as file:
            absent = {name for name, where in weight_map.items() if where == shard} - set(file.keys())
        if absent:
            raise CheckpointError(f"{index.parent / shard} lacks tensors its index promises: {name_list(absent)}")
    return {name: index.parent / shard for name, shard in weight_map.items()}


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: It is missing or not a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"no {Path(path).name} in {Path(path).parent}; the folder is incomplete") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


# ------------------------------------------------------------------------------------------------ tensors to modules


def check_names_and_shapes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: str, ignore: Iterable[str] = ()
) -> None:
    """Compare what a checkpoint holds with what a module needs.

    Args:
        module: The module to be filled; only looked at.
        shapes: Tensor name → shape of the checkpoint.
        where: Name of the checkpoint for the message.
        ignore: Names of the module's that may be missing (tied weights).

    Raises:
        CheckpointError: Names or shapes differ; the message lists the first few and how many.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = set(wanted) - set(shapes) - set(ignore)
    extra = set(shapes) - set(wanted)
    wrong = [name for name in set(wanted) & set(shapes) if wanted[name] != tuple(shapes[name])]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({name_list(missing)})")
    if extra:
        problems.append(f"{len(extra)} unexpected ({name_list(extra)})")
    if wrong:
        shown = [f"{name}: {list(shapes[name])} instead of {list(wanted[name])}" for name in sorted(wrong)[:3]]
        problems.append(f"{len(wrong)} of another shape ({'; '.join(shown)}{' …' if len(wrong) > 3 else ''})")
    if problems:
        raise CheckpointError(
            f"weights {where} don't fit {type(module).__name__}: tensors {', '.join(problems)}; "
            "use the weights and config of one and the same model"
        )


def load_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor], where: str = "state dict") -> None:
    """Copy tensors into a module, all or nothing; the module keeps its dtype and device.

    Raises:
        CheckpointError: Names or shapes differ. The module is then untouched.
    """
    check_names_and_shapes(module, {name: tuple(value.shape) for name, value in state.items()}, where)
    module.load_state_dict(dict(state), strict=True)


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill a module from a safetensors file, a component folder or a sharded one.

    Half-precision storage is converted to the module's own dtype. Names and shapes are compared from the headers,
    before the module is touched; shards are then copied one at a time.

    Raises:
        CheckpointError: Something is missing, damaged, of another shape, or a pickle.
    """
    where = find_weights(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(set(where.values())):
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle isn't iterable
                if where.get(name) == file:
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
    check_names_and_shapes(module, shapes, str(path))
    targets = module.state_dict()
    with torch.no_grad():
        for file in sorted(set(where.values())):
            with open_weights(file) as opened:
                for name in (name for name, place in where.items() if place == file):
                    targets[name].copy_(opened.get_tensor(name))


def describe_weights(path: str | Path) -> dict[str, Any]:
    """Count what lies in a component folder, from headers alone.

    Returns:
        ``tensors``, ``parameters`` and ``bytes`` of its weights; empty if it has none.

    Raises:
        CheckpointError: Its weights are damaged.
    """
    path = Path(path)
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        return {}
    where = find_weights(path)
    parameters = 0
    files = set(where.values())
    for file in files:
        with open_weights(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - a safetensors handle isn't iterable
                size = 1
                for length in opened.get_slice(name).get_shape():
                    size *= length
                parameters += size
    return {"tensors": len(where), "parameters": parameters, "bytes": sum(file.stat().st_size for file in files)}


def load_tensors(path: str | Path, allow_pickle_tensors: bool = False) -> dict[str, torch.Tensor]:
    """Load all tensors of a file or component folder.

    Args:
        path: See :func:`find_weights`.
        allow_pickle_tensors: Also read ``.bin``/``.pt``/``.pth``/``.ckpt`` files through PyTorch's restricted
            unpickler, which builds tensors and plain containers only and refuses code. For converting old checkpoints.

    Returns:
        Tensor name → tensor on the CPU.

    Raises:
        CheckpointError: It is missing, damaged, or a pickle that is not allowed or holds more than tensors.
    """
    path = Path(path)
    if path.is_file() and path.suffix in _PICKLES and allow_pickle_tensors:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path} is damaged or holds more than tensors, which may be code; refused"
            ) from error
        state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{path} must hold a mapping of names to tensors")
        return cast("dict[str, torch.Tensor]", state)
    where = find_weights(path)
    state = {}
    for file in sorted(set(where.values())):
        with open_weights(file) as opened:
            state.update({name: opened.get_tensor(name) for name, place in where.items() if place == file})
    return state


def save_tensors(
    state: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically; tensors that share memory are stored separately.

    Raises:
        StorageError: It can't be written; the destination is then what it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(own, str(temporary), metadata={"format": "pt", **(metadata or {})})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise storage_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_component(module: Any, folder: str | Path, dtype: str = "float32") -> None:
    """Write one component as ``config.json`` and weights, or, if it isn't a module, by its own ``save_pretrained``.

    Args:
        module: A diffusers ``ModelMixin``/``ConfigMixin`` or anything with ``save_pretrained``.
        folder: Destination.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` for the floating-point tensors on disk.

    Raises:
        StorageError: It can't be written.
        CheckpointError: ``dtype`` is another.
    """
    folder = Path(folder)
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype on disk must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(module, nn.Module) and hasattr(module, "save_config"):
            cast("Any", module).save_config(folder)
            state = {
                name: value.to(_DTYPES[dtype]) if value.is_floating_point() else value
                for name, value in module.state_dict().items()
            }
            if state:
                save_tensors(state, folder / WEIGHTS_NAME)
        else:
            module.save_pretrained(folder)
    except (StorageError, CheckpointError):
        raise
    except (OSError, SafetensorError) as error:
        raise storage_error(folder, error) from error


def check_settings(cls: type[Any], folder: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a component.

    Raises:
        CheckpointError: It is missing, damaged, or has settings that the class doesn't know.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    known = set(getattr(cls, "_get_init_keys", lambda _: set())(cls))
    unknown = {key for key in config if not key.startswith("_")} - known
    if known and unknown:
        raise CheckpointError(f"{path} has settings {cls.__name__} doesn't know: {name_list(unknown)}")
    return config


def load_component(cls: type[Any], folder: str | Path) -> Any:
    """Read one component that :func:`save_component` wrote, in float32, in evaluation mode.

    Raises:
        CheckpointError: Its config or weights are missing, damaged or don't fit each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; the model is incomplete")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        try:
            return cls.from_pretrained(folder)
        except CheckpointError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"could not load {cls.__name__} from {folder}: {reason}") from error
    config = check_settings(cls, folder)
    try:
        module = cast("Any", cls).from_config(config)
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / 'config.json'} doesn't describe a {cls.__name__}: {reason}") from error
    if module.state_dict():
        load_weights(module, folder)
    return module.eval()
