"""What a feature cache saves in training: steps with it and without it, in turns, in one process, on the same samples.

*Without*: every step draws its pictures, encodes them with the autoencoder and runs the teacher on its pairs, as the
published trainer does. *With*: latents and teacher embeddings are read from what ``unialign cache`` makes. The model,
its forward and backward pass, the optimizer and the loop are the same object on both sides, and both sides' losses are
compared before anything is timed. Samples are prepared in the training process, since on one core a background worker
saves nothing. Three cases: no teacher; the teachers that ``nano`` can have (``teacher.name=package``; skipped, saying
so, where the optional packages are missing); and a dual encoder of 126 M random parameters (CLIP's ViT-B/32).
Pictures that change at every showing (``world.jitter``) can't be cached, so neither side changes them.

    python benchmarks/feature_cache.py --json benchmarks/results/feature-cache-nano.json
    python benchmarks/feature_cache.py --config configs/tiny.yaml --steps 2 --random-size tiny        a rehearsal
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unialignment.alignment.teachers import load_teacher
from unialignment.benchmarking.measure import Machine, Timing, interleave, ratio
from unialignment.errors import AssetError
from unialignment.storage import write_json
from unialignment.training.caching import build_cache, make_plan
from unialignment.training.config import TransformerConfig, load_config
from unialignment.training.loop import Trainer
from unialignment.training.runtime import autocast
from unialignment.training.samples import StepProducer, StepSource
from unialignment.training.sharing import Micro

NANO = Path(__file__).resolve().parents[1] / "src" / "unialignment" / "weights" / "nano"
WARM_UP = 2
CASES = ("none", "package", "random")
WIDTHS = {"126M": {}, "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}}
"""What differs from CLIP's ViT-B/32 in both encoders of the random teacher."""


def random_teacher(folder: Path, size: str) -> Path:
    """Write a dual encoder of CLIP's shape with random weights, its tokenizer ours."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(NANO / "tokenizer" / "tokenizer.json"), pad_token="[PAD]", eos_token="[PAD]"
    )
    torch.manual_seed(0)
    shared = WIDTHS[size] | ({"num_attention_heads": 2} if size == "tiny" else {})
    text = shared | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    text |= {"max_position_embeddings": 77, "pad_token_id": tokenizer.pad_token_id}
    CLIPModel(CLIPConfig(text_config=text, vision_config=shared)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(args: argparse.Namespace, folder: Path, teacher: str | None) -> TransformerConfig:
    """The run's configuration; the bundled autoencoder and tokenizer, unless told otherwise."""
    overrides = [
        f"run.dir={folder / 'run'}",
        "run.threads=1",
        "run.compile=off",
        "world.jitter=0",
        "logging.validation_samples=1",
        "logging.tensorboard=false",
        f"autoencoder.path={NANO / 'autoencoder'}",
        f"text.tokenizer={NANO / 'tokenizer'}",
        *([] if teacher is None else [f"teacher.name={teacher}", "loss.intrinsic=0.1"]),
        *args.override,
    ]
    return load_config(args.config, overrides)


def stepper(trainer: Trainer, produce: Callable[[int], Micro]) -> Callable[[], None]:
    """One whole step, data included, on the next positions, each time that it is called."""
    position = 0

    def step() -> None:
        nonlocal position
        micros = [produce(position + index) for index in range(trainer.layout.local)]
        position += len(micros)
        trainer.step(micros)

    return step


@torch.no_grad()
def loss(trainer: Trainer, produce: Callable[[int], Micro]) -> float:
    """Loss of the first micro-batch."""
    with autocast(trainer.device, trainer.config.run.precision):
        return float(trainer.objective(produce(0)[0], torch.Generator().manual_seed(0)).loss)


def measure(args: argparse.Namespace, folder: Path, teacher: str | None) -> dict[str, Any]:
    """One case.

    Raises:
        AssetError: the teacher's packages are missing.
    """
    live = None if teacher is None else load_teacher(teacher)
    config = settings(args, folder, teacher)
    scenes = (args.steps + WARM_UP) * config.micro_batches * max(config.mixture.values())
    began = time.process_time()
    store = build_cache(make_plan(config, folder / "features", scenes, 64), report=lambda _: None)
    spent = time.process_time() - began
    cached = config.model_copy(update={"data": config.data.model_copy(update={"cache": folder / "features"})})
    trainer = Trainer(cached, Console(quiet=True))
    trainer.progress.start()
    tokenizer = config.run.folder / "tokenizer"
    without = StepProducer(StepSource(config, tokenizer))
    without.cache = live  # runs at every step, and remembers nothing
    having = StepProducer(StepSource(cached, tokenizer))
    losses = loss(trainer, without), loss(trainer, having)
    if abs(losses[0] - losses[1]) > 0.01 * abs(losses[0]):
        raise SystemExit(f"the two sides do not train on the same: losses {losses[0]:.5f} and {losses[1]:.5f}")
    sides = {"uncached": stepper(trainer, without), "cached": stepper(trainer, having)}
    seconds = interleave(sides, args.steps, WARM_UP)
    return {
        "teacher_parameters": _parameters(live),
        "samples_a_step": trainer.per_step,
        **{f"{name}_seconds": vars(Timing.of(values)) for name, values in seconds.items()},
        **{f"{n}_samples_per_second": trainer.per_step / Timing.of(v).median for n, v in seconds.items()},
        "throughput_ratio": vars(ratio(seconds["uncached"], seconds["cached"])),
        "losses": losses,
        "cache": {
            "seconds": spent,
            "scenes": scenes,
            "bytes": sum(f.stat().st_size for f in (folder / "features").rglob("*.safetensors")),
            "latents": store.count("latent"),
        },
    }


def _parameters(teacher: Any) -> int:
    """Weights inside a teacher, or a pair of them."""
    parts = [teacher, getattr(teacher, "_image", None), getattr(teacher, "_text", None)]
    models = [part._model for part in parts if hasattr(part, "_model")]
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/nano.yaml", help="a run on the scene world")
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps of each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--random-size", choices=sorted(WIDTHS), default="126M")
    parser.add_argument("--json", type=Path)
    parser.add_argument("override", nargs="*", metavar="key=value", help="after --, settings of the run")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "config": args.config,
        "overrides": args.override,
        "machine": Machine.measured(3).to_json(),
        "cases": {},
    }
    for case in args.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                teacher = str(random_teacher(folder / "teacher", args.random_size)) if case == "random" else case
                row = measure(args, folder, None if case == "none" else teacher)
            except AssetError as error:
                if case != "package":
                    raise
                print(f"package: skipped: {error}", file=sys.stderr)
                result["cases"][case] = {"skipped": str(error)}
                continue
        result["cases"][case] = row
        gain = Timing(**row["throughput_ratio"])
        print(
            f"{case:<8} teacher of {row['teacher_parameters'] / 1e6:6.1f} M: "
            f"{row['uncached_samples_per_second']:7.1f} samples/s uncached, {row['cached_samples_per_second']:7.1f} "
            f"cached, ratio {gain}; cache of {row['cache']['scenes']} scenes made in {row['cache']['seconds']:.0f} s",
            flush=True,
        )
    if args.json is not None:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
