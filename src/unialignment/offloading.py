"""Weights that wait elsewhere until they are needed: diffusers' and accelerate's hooks on our components.

Model offload holds one component on the device at a time, sequential offload one block, group offload one group of
blocks, whose rest lies in memory or on disk. Their hooks act on ``forward``; components of ours have more entrances
(``encode``, ``prefill``, …), so while offloading is on, all of them lead through ``forward``. Knows nothing of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unialignment.errors import InputError

ENTRANCES: dict[str, tuple[str, ...]] = {
    "transformer": ("prefill", "denoise", "embed", "time_modulation", "fuse_projections"),
    "text_embedder": ("embed",),
    "autoencoder": ("encode", "decode"),
}
"""Methods, beside ``forward``, by which a component is used."""
ORDER = ("text_embedder", "transformer", "autoencoder")
"""Order of use, as diffusers' ``model_cpu_offload_seq``."""
_GROUP = "group_offloading"  # diffusers' name of its hook
_PREFETCH = ("lazy_prefetch_group_offloading", "layer_execution_tracker")


@dataclass
class Offload:
    """An offloading that is on.

    Attributes:
        kind: ``"model"``, ``"sequential"`` or ``"group"``.
        device: Where computing is done.
        again: Switches the same offloading on for the components as they are then.
        rest: Sends away what is still on the device, at the end of a call.
    """

    kind: str
    device: torch.device
    again: Callable[[], Offload]
    rest: Callable[[], None] = lambda: None
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def remove(self) -> None:
        """Take all hooks away; weights are where they wait, on the CPU."""
        for step in reversed(self._undo):
            step()
        self._undo.clear()


def usable_device(device: str | torch.device) -> torch.device:
    """A device by name, once a tensor could be made on it.

    Raises:
        InputError: It can't be used here.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise InputError(f"device {str(device)!r} can't be used here: {reason[:120]}") from error
    return target


def accelerator(device: str | torch.device | None, what: str) -> torch.device:
    """The device to offload from: the one given, or the accelerator that there is.

    Raises:
        InputError: There is none, or it can't be used.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            raise InputError(
                f"{what} moves weights between an accelerator and the CPU, and there is no accelerator here; leave it "
                'out, or lower memory by dtype="bfloat16", quantize or drop_text_encoder'
            )
        device = found
    return torch.empty(0, device=usable_device(device)).device


def model_offload(components: Mapping[str, nn.Module], device: torch.device) -> Offload:
    """One component on the device at a time, the others on the CPU (accelerate's ``CpuOffload``, as in diffusers)."""
    from accelerate.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module, remove_hook_from_module

    class OneAtATime(CpuOffload):  # type: ignore[misc]
        """diffusers chains each component to the one before it, which fits pipelines that run in one order.

        Ours may go back (a text is embedded anew at every step), so whichever comes next sends away all others.
        """

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for other in hooks:
                if other.model is not module and next(other.model.parameters()).device.type != "cpu":
                    other.offload()
            return super().pre_forward(module, *args, **kwargs)

    offload = Offload("model", device, lambda: model_offload(components, device))
    hooks: list[Any] = []
    for name in ORDER:
        module = components[name]
        nn.Module.to(module, "cpu")
        if next(module.parameters(), None) is None:
            continue
        _open(offload, name, module)
        hook = OneAtATime(device)
        add_hook_to_module(module, hook)
        hooks.append(UserCpuOffloadHook(module, hook))
        offload._undo.append(partial(remove_hook_from_module, module))

    def rest() -> None:
        for hook in hooks:
            hook.offload()

    offload.rest = rest
    offload._undo.append(rest)
    return offload


def sequential_offload(components: Mapping[str, nn.Module], device: torch.device) -> Offload:
    """One layer, and of the transformer one block, on the device at a time (accelerate's ``cpu_offload``).

    The transformer's embeddings and heads, a small part, stay on the device.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    offload = Offload("sequential", device, lambda: sequential_offload(components, device))

    def attach(module: nn.Module, **options: Any) -> None:
        before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        cpu_offload(module, device, offload_buffers=False, **options)

        def detach() -> None:
            remove_hook_from_module(module, recurse=True)
            _tidy(module)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(before.get(name, False))

        offload._undo.append(detach)

    for name in ORDER:
        module: Any = components[name]
        nn.Module.to(module, "cpu")
        _open(offload, name, module)
        if name != "transformer":
            attach(module)
            continue
        offload._undo.append(partial(nn.Module.to, module, "cpu"))
        blocks = list(module.transformer_blocks)
        for block in blocks:
            # Blocks read weights of their layers outright, so a block comes and goes as a whole.
            attach(block, preload_module_classes=[type(block).__name__])
        rest = [part for key, part in module.named_children() if key != "transformer_blocks"]
        for part in rest:
            part.to(device)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        _without_blocks_ahead(module)
    return offload


def group_offload(
    components: Mapping[str, nn.Module],
    device: torch.device,
    *,
    offload_device: torch.device,
    offload_type: str,
    num_blocks_per_group: int,
    use_stream: bool,
    offload_to_disk_path: str | Path | None,
    exclude: tuple[str, ...],
) -> Offload:
    """Groups of blocks on the device, one after another (diffusers' ``apply_group_offloading``).

    The transformer goes block by block in either type. A T5 encoder, whose blocks are nested, goes layer by layer.
    """
    from diffusers.hooks import apply_group_offloading
    from diffusers.hooks.hooks import HookRegistry

    settings: dict[str, Any] = {
        **{"offload_device": offload_device, "offload_type": offload_type, "exclude": exclude},
        **{"num_blocks_per_group": num_blocks_per_group, "use_stream": use_stream},
        "offload_to_disk_path": offload_to_disk_path,
    }
    offload = Offload("group", device, lambda: group_offload(components, device, **settings))

    def detach(module: nn.Module, path: str | None) -> None:
        if path is not None:
            _fetch(module)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        for hook in (_GROUP, *_PREFETCH):
            registry.remove_hook(hook, recurse=True)
        _tidy(module)
        nn.Module.to(module, "cpu")

    for name in ORDER:
        module = components[name]
        if name in exclude:
            module.to(device)
            offload._undo.append(partial(nn.Module.to, module, "cpu"))
            continue
        if not any(True for _ in module.parameters()):
            continue
        _open(offload, name, module)
        kind = "block_level" if name == "transformer" else offload_type
        if name == "text_embedder" and hasattr(module, "encoder"):
            kind = "leaf_level"
        path = None if offload_to_disk_path is None else str(Path(offload_to_disk_path) / name)
        apply_group_offloading(
            module,
            onload_device=device,
            offload_device=offload_device,
            offload_type=kind,
            num_blocks_per_group=num_blocks_per_group if kind == "block_level" else None,
            use_stream=use_stream,
            offload_to_disk_path=path,
        )
        offload._undo.append(partial(detach, module, path))
        if name == "transformer":
            _without_blocks_ahead(module)
    return offload


def _tidy(module: nn.Module) -> None:
    """Hooks that are removed leave plain ``forward`` methods behind, bound to one object, which a copy would share."""
    for part in module.modules():
        left = vars(part).get("forward")
        if getattr(left, "__self__", None) is part:
            del part.forward


def _fetch(module: nn.Module) -> None:
    """Bring every group back from disk."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_GROUP)
        if hook is not None and hook.group.offload_leader is part:
            hook.group.onload_()


def _without_blocks_ahead(transformer: nn.Module) -> None:
    """Nothing is prepared for all blocks ahead, which aren't there: neither the time's share nor fused weights."""
    for name in ("time_modulation", "fuse_projections"):
        setattr(transformer, name, lambda *_, **__: None)  # in place of entrances, which are closed at the end


def _open(offload: Offload, name: str, module: nn.Module) -> None:
    """Lead a component's entrances through its ``forward``, where hooks are."""
    inside = False
    cls: Any = type(module)

    def forward(*args: Any, _entrance: str = "forward", **kwargs: Any) -> Any:
        nonlocal inside
        before, inside = inside, True
        try:
            return getattr(cls, _entrance)(module, *args, **kwargs)
        finally:
            inside = before

    def entrance(method: str) -> Callable[..., Any]:
        def enter(*args: Any, **kwargs: Any) -> Any:
            # What a pass calls on its way has its weights there already.
            if inside:
                return getattr(cls, method)(module, *args, **kwargs)
            return module(*args, _entrance=method, **kwargs)

        return enter

    module.forward = forward
    names = [method for method in ENTRANCES[name] if hasattr(cls, method)]
    for method in names:
        setattr(module, method, entrance(method))

    def close() -> None:
        for method in (*names, "forward"):
            module.__dict__.pop(method, None)

    offload._undo.append(close)
