"""Arguments of commands about memory and LoRAs, and the pipeline that they lead to. Knows nothing of tasks."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from unialignment.errors import InputError

if TYPE_CHECKING:
    from unialignment.model.lora import LoraReport
    from unialignment.pipeline import UniAlignmentPipeline


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that uses a model."""
    group = parser.add_argument_group("memory and LoRA")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="add a LoRA file's change, e.g. style.safetensors:0.8; may be repeated",
    )
    group.add_argument(
        "--max-memory", metavar="SIZE", help="get along with this much memory of the device, like 8GiB, or say why not"
    )
    group.add_argument(
        "--offload",
        choices=("model", "group", "sequential"),
        help="keep weights on the CPU and one component, block or layer on the accelerator",
    )
    group.add_argument(
        "--drop-text-encoder", action="store_true", help="free a T5 encoder once prompts are encoded (pictures)"
    )
    group.add_argument(
        "--quantize",
        metavar="BITS",
        help="8bit or 4bit weights of transformer and text encoder, or e.g. text_embedder=8bit",
    )
    group.add_argument("--vae-tiling", action="store_true", help="encode and decode large pictures tile by tile")


def path_and_scale(text: str, option: str = "--lora") -> tuple[str, float]:
    """``PATH[:SCALE]`` as a path and a strength, 1 unless given.

    Raises:
        InputError: There is no path, or the strength isn't finite; ``option`` is named.
    """
    path, colon, scale = text.rpartition(":")
    if colon:
        try:
            strength = float(scale)
        except ValueError:
            path, strength = text, 1.0
    else:
        path, strength = text, 1.0
    if not path or not math.isfinite(strength):
        raise InputError(f"{option} wants PATH or PATH:SCALE, got {text!r}")
    return path, strength


def load_pipeline(args: argparse.Namespace) -> UniAlignmentPipeline:
    """The pipeline that the arguments describe; what was chosen and what didn't fit goes to standard error.

    Raises:
        InputError: Arguments exclude each other, or the model can't be had within them.
        CheckpointError: The model or a LoRA is unusable.
    """
    import unialignment
    from unialignment.offloading import accelerator

    given: dict[str, Any] = vars(args)
    loras = [path_and_scale(text) for text in given.get("lora") or []]
    offload, max_memory = given.get("offload"), given.get("max_memory")
    if offload and max_memory:
        raise InputError("--max-memory chooses the offloading itself; leave out --offload")
    if offload and args.device and args.device.startswith("cpu"):
        raise InputError("--offload moves weights between an accelerator and the CPU; name the accelerator by --device")
    if loras and given.get("quantize"):
        raise InputError(
            "--lora needs plain weights; write a model with it by `unialign merge`, or leave out --quantize"
        )
    if offload:
        accelerator(args.device, f"{offload} offload")  # before anything is read
    pipe = unialignment.load(
        args.model,
        device="cpu" if offload else args.device,
        dtype=args.dtype,
        allow_urls=args.allow_urls,
        max_memory=max_memory,
        drop_text_encoder=given.get("drop_text_encoder", False),
        quantize=given.get("quantize"),
    )
    notes: list[str] = []
    if pipe.memory_choice is not None:
        notes.append(f"max-memory: {pipe.memory_choice.summary()}")
    for number, (path, scale) in enumerate(loras):
        report = pipe.load_lora(path, scale, name=f"lora{number + 1}")
        notes.append(f"lora {path} at {scale:g}: {report.summary()}")
        notes += unmatched_lines(report)
    if given.get("vae_tiling"):
        pipe.enable_vae_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(args.device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(args.device)
    elif offload == "group":
        pipe.enable_group_offload(args.device)
    args.notes = notes
    if not (given.get("quiet") or given.get("json")):
        for note in notes:
            print(note, file=sys.stderr)
    return pipe


def unmatched_lines(report: LoraReport) -> list[str]:
    """Every key of a LoRA file that found no place, with the reason."""
    return [f"  unmatched {name}: {reason}" for name, reason in sorted(report.unmatched.items())]
