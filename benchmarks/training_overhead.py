"""What the training loop costs beside its arithmetic: the loop against a bare one, interleaved, on the same batches.

The bare loop does forward, backward, clipping and optimizer step on tensors that are in memory. The loop under test
does what ``unialign train`` does in every step: data from the background worker, averaged weights, guard, logs. Both
take the same micro-batches in turn, so that whatever else the machine does hits both alike; medians are compared.

    python benchmarks/training_overhead.py                                   the nano model
    python benchmarks/training_overhead.py --config configs/tiny.yaml --steps 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unialignment.storage import write_json
from unialignment.training.config import load_config
from unialignment.training.data import Prefetcher
from unialignment.training.loop import Trainer
from unialignment.training.runtime import autocast
from unialignment.training.throughput import Window


def bare_step(trainer: Trainer, batches: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, clipping, step."""
    with autocast(trainer.device, trainer.config.run.precision):
        loss = trainer.objective(batches, trainer.noise).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(config: Any, steps: int) -> dict[str, float]:
    """Median seconds of both, over ``steps`` pairs of steps."""
    trainer = Trainer(config, Console(quiet=True))
    trainer.progress.start()
    loop, bare = [], []
    window = Window()
    with Prefetcher(trainer.source, 0, config.data.workers, config.data.prefetch) as data:
        for step in range(steps + 3):
            began = time.perf_counter()
            micros = [next(data) for _ in range(trainer.layout.local)]
            window.tokens += trainer.count_tokens(micros)
            window.add(trainer.step(micros))
            if (step + 1) % config.logging.log_every == 0:
                window.means()
            whole = time.perf_counter() - began
            ready = [batches for batches, _ in micros]
            began = time.perf_counter()
            for batches in ready:
                bare_step(trainer, batches, trainer.optimizer)
            alone = time.perf_counter() - began
            if step >= 3:  # the first ones allocate
                loop.append(whole)
                bare.append(alone)
    first, second = statistics.median(loop), statistics.median(bare)
    return {"loop_seconds": first, "bare_seconds": second, "throughput_of_bare": second / first, "steps": steps}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/nano.yaml")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    parser.add_argument("override", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={folder}", "logging.validation_samples=1", "logging.tensorboard=false", *args.override]
        result = measure(load_config(args.config, overrides), args.steps)
    print(json.dumps(result))
    if args.out is not None:
        write_json(args.out, {"config": args.config, "overrides": args.override, **result})


if __name__ == "__main__":
    main()
