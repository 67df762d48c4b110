"""Trains the world's image autoencoder: ``python -m unialignment.training.autoencoder configs/autoencoder.yaml``.

An endless mixture of rendered scenes, maps and single sprites; validation on held-out scenes and their maps, by
kind. Resumable. Knows nothing of language or of the transformer.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from unialignment.errors import ConfigError, UniAlignmentError
from unialignment.storage import write_text
from unialignment.training.checkpoint import (
    CheckpointStore,
    flatten_optimizer,
    random_states,
    restore_optimizer,
    restore_random_states,
    with_prefix,
    without_prefix,
)
from unialignment.training.config import AutoencoderConfig, AutoencoderMixSection, load_config, to_yaml
from unialignment.training.data import Prefetcher
from unialignment.training.ema import ExponentialMovingAverage
from unialignment.training.logging import RunLog, duration, grid, table
from unialignment.training.optimizer import build_optimizer
from unialignment.training.runtime import (
    StopRequest,
    autocast,
    choose_device,
    compile_if_faster,
    seed_everything,
    set_threads,
)
from unialignment.training.schedule import Progress, learning_rate_factor

KINDS = ("scene", "segment", "depth", "edges", "sprite")
"""Kinds of pictures, and of validation figures."""

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class PictureSource:
    """Builds the producer of picture batches inside a data worker.

    Attributes:
        preset: World preset.
        pack: Sprite pack file; ``None``: the user's cache.
        split: World split.
        mix: Shares of scenes, maps and singles.
        batch_size: Pictures per batch.
        seed: Seed of everything.
    """

    preset: str
    pack: Path | None
    split: Any
    mix: AutoencoderMixSection
    batch_size: int
    seed: int

    def __call__(self) -> _PictureProducer:
        return _PictureProducer(self)


class _PictureProducer:
    """Batch ``i`` as a pure function of ``i``."""

    def __init__(self, source: PictureSource) -> None:
        from unialignment.world.presets import preset
        from unialignment.world.render import Renderer
        from unialignment.world.sprites import SpritePack

        self.source = source
        pack = SpritePack.load(source.pack)
        self.preset = preset(source.preset, pack)
        self.renderer = Renderer(pack, self.preset.resolution)
        shares = np.array([source.mix.scenes, source.mix.maps, source.mix.singles], dtype=np.float64)
        if shares.sum() <= 0:
            raise ConfigError("mix: at least one of scenes, maps and singles must be above 0.")
        self.shares = shares / shares.sum()

    def __call__(self, index: int) -> Pictures:
        rng = np.random.default_rng((self.source.seed, 0xAE, index))
        groups = rng.choice(3, size=self.source.batch_size, p=self.shares)
        names = ("scene", None, "sprite")
        return np.stack([self.picture(rng, names[g] or KINDS[1 + int(rng.integers(3))]) for g in groups])

    def picture(self, rng: np.random.Generator, kind: str) -> Pictures:
        """One picture ``[R, R, 3]`` of a kind."""
        from unialignment.world.layout import sample_scene
        from unialignment.world.scene import Scene

        if kind == "sprite":
            if rng.random() < 0.3:
                return self.renderer.render(Scene(str(rng.choice(self.preset.backgrounds))))
            return self.renderer.render(sample_scene(rng, self.preset, split=self.source.split, count=1))
        scene = sample_scene(rng, self.preset, split=self.source.split)
        if kind == "scene":
            return self.renderer.render(scene)
        if kind == "segment":
            return self.renderer.mask(scene, int(rng.integers(len(scene.objects))))
        return self.renderer.depth(scene) if kind == "depth" else self.renderer.edges(scene)


def validation_pictures(source: PictureSource, count: int) -> dict[str, Pictures]:
    """The fixed validation set: ``count`` pictures ``[count, R, R, 3]`` of each kind, of ``source``'s split."""
    producer = _PictureProducer(source)
    result = {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng((source.seed, 0x7E57, number))
        result[kind] = np.stack([producer.picture(rng, kind) for _ in range(count)])
    return result


def to_tensor(pictures: Pictures, device: torch.device, channels_last: bool = False) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to float ``[B, 3, H, W]`` in [-1, 1]."""
    tensor = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


def to_pictures(images: Tensor) -> Pictures:
    """Float ``[B, 3, H, W]`` in [-1, 1] to uint8 ``[B, H, W, 3]``."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class AutoencoderTrainer:
    """One resumable run.

    Args:
        config: The run's configuration.
        console: Where to talk; silent by default in tests.
    """

    def __init__(self, config: AutoencoderConfig, console: Console | None = None) -> None:
        from unialignment.model.autoencoder import WorldAutoencoder, load_autoencoder

        self.config = config
        self.console = console or Console(stderr=True)
        self.folder = config.run.folder
        self.device = choose_device(config.run.device)
        set_threads(config.run.threads)
        seed_everything(config.run.seed)
        if config.initial is not None:
            self.model = load_autoencoder(config.initial)
            if not isinstance(self.model, WorldAutoencoder):
                raise ConfigError(
                    f"initial={config.initial} holds a {type(self.model).__name__}; this trainer goes on with a "
                    "WorldAutoencoder only"
                )
            if config.decoder_only:
                self.model.autoencoder.encoder.requires_grad_(False)
            else:
                # The statistics belong to the weights they were measured on; they are measured anew at the end.
                self.model.latent_mean.zero_()
                self.model.latent_std.fill_(1.0)
        elif config.decoder_only:
            raise ConfigError(
                "decoder_only=true trains the decoder of an autoencoder that exists: name its folder by initial=..."
            )
        else:
            try:
                self.model = WorldAutoencoder(**config.model)
            except TypeError as error:
                raise ConfigError(f"model: {error}. It takes the arguments of WorldAutoencoder.") from None
        self.model.to(self.device).train()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.ema = ExponentialMovingAverage(self.model, config.ema.decay, config.ema.warmup)
        self.progress = Progress(config.run.max_steps, config.run.budget_seconds)
        self.store = CheckpointStore(self.folder / "checkpoints", config.run.keep_checkpoints)
        self.noise = torch.Generator(self.device.type).manual_seed(config.run.seed)
        world = config.world
        self.source = PictureSource(
            world.preset, world.pack, world.split, config.mix, config.batch_size, config.run.seed
        )
        held_out = PictureSource(world.preset, world.pack, "held_out", config.mix, config.batch_size, config.run.seed)
        self.validation = validation_pictures(held_out, config.validation_pictures)
        self.best: dict[str, float] = {}
        self.skipped = 0
        self.resumed_at: int | None = None

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        """Write a checkpoint.

        Raises:
            StorageError: it could not be written; earlier ones are intact.
        """
        optimizer_tensors, optimizer_plain = flatten_optimizer(self.optimizer)
        random_tensors, random_plain = random_states()
        ema = self.ema.state_dict()
        tensors = {
            **with_prefix("model.", self.model.state_dict()),
            **with_prefix("ema.", {k: v for k, v in ema.items() if isinstance(v, Tensor)}),
            **with_prefix("optimizer.", optimizer_tensors),
            **with_prefix("random.", random_tensors),
            "noise": self.noise.get_state(),
        }
        state = {
            "progress": self.progress.state_dict(),
            "ema_updates": ema["updates"],
            "optimizer": optimizer_plain,
            "random": random_plain,
            "skipped": self.skipped,
            "validation": self.best,
            "config": self.config.model_dump(mode="json"),
        }
        return self.store.save(self.progress.step, tensors, state)

    def resume(self) -> bool:
        """Continue from the latest checkpoint, if there is one."""
        latest = self.store.latest()
        if latest is None:
            return False
        tensors, state = self.store.load(latest)
        now, then = self.config.model_dump(mode="json"), state.get("config", {})
        for section in ("model", "world", "mix", "batch_size", "decoder_only"):
            if section in then and now[section] != then[section]:
                raise ConfigError(
                    f"{self.folder} holds a run with another {section!r} setting. Use a new run.dir, or run.fresh=true "
                    "to start over in this one."
                )
        self.model.load_state_dict(without_prefix("model.", tensors))
        self.ema.load_state_dict({**without_prefix("ema.", tensors), "updates": state["ema_updates"]})
        restore_optimizer(self.optimizer, without_prefix("optimizer.", tensors), state["optimizer"])
        restore_random_states(without_prefix("random.", tensors), state["random"])
        self.noise.set_state(tensors["noise"])
        self.progress.load_state_dict(state["progress"])
        self.skipped = state["skipped"]
        self.best = state["validation"]
        self.resumed_at = self.progress.step
        return True

    # --------------------------------------------------------------------------------------------------- training

    def _batches(self, start: int) -> Prefetcher[Pictures]:
        data = self.config.data
        return Prefetcher(self.source, start, data.workers, data.prefetch, lambda text: self.console.print(text))

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(self.device, self.config.run.precision):
            losses: dict[str, Tensor] = self.model.training_loss(images, self.noise, **self.config.loss.model_dump())
        return losses

    def _step(self, images: Tensor) -> dict[str, float]:
        options = self.config.optimizer
        factor = learning_rate_factor(
            self.progress.step, self.progress.fraction, options.warmup_steps, options.schedule, options.final
        )
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor
        losses = self._forward(images)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        logs = {name: float(value.detach()) for name, value in losses.items()}
        logs |= {"gradient_norm": float(norm), "learning_rate": options.lr * factor}
        if math.isfinite(logs["loss"]) and math.isfinite(logs["gradient_norm"]):
            self.optimizer.step()
            self.ema.update()
        else:
            self.skipped += 1
            if self.skipped > self.config.run.max_skipped_steps:
                raise UniAlignmentError(
                    f"{self.skipped} steps had a loss or gradient that is not finite; the run stopped at step "
                    f"{self.progress.step}. Lower optimizer.lr or use run.precision=fp32, then resume."
                )
        self.progress.step += 1
        return logs

    def train(self) -> Path:
        """Train until the budget is spent or a signal arrives; continues a run found in the folder.

        Returns:
            The folder with the finished weights, or the run folder if stopped early.

        Raises:
            StorageError: a checkpoint or log could not be written.
        """
        config = self.config
        if config.run.fresh:
            self.store.clear()
        resumed = self.resume()
        log = RunLog(self.folder, resume_step=self.resumed_at)
        write_text(self.folder / "config.yaml", to_yaml(config))
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.console.print(
            f"Autoencoder, {size:.2f} M parameters, {config.batch_size} pictures a step, in {self.folder}"
            + (f", resumed at step {self.progress.step}" if resumed else "")
        )
        stop = StopRequest()
        with stop.watching(), self._batches(self.progress.step) as batches:
            self.progress.start()
            self._compile(next(iter(self._sample_batches(1))))
            try:
                self._loop(batches, log, stop)
            except UniAlignmentError:
                log.close()
                raise
        self.save()
        if stop.requested and not self.progress.done:
            log.close()
            self.console.print(
                f"Stopped by {stop.requested} after step {self.progress.step}; saved. Run the same command to resume."
            )
            return self.folder
        result = self.finish(log)
        log.close()
        return result

    def _sample_batches(self, count: int) -> Iterator[Tensor]:
        """Training pictures from indices that no run reaches."""
        producer = self.source()
        for index in range(count):
            yield to_tensor(producer(2**40 + index), self.device, self.config.channels_last)

    def _compile(self, images: Tensor) -> None:
        state = self.noise.get_state()

        def step() -> None:
            self._forward(images)["loss"].backward()  # type: ignore[no-untyped-call]

        modules = [self.model.autoencoder.encoder, self.model.autoencoder.decoder]
        compile_if_faster(self.config.run.compile, modules, step, lambda text: self.console.print(text))
        self.optimizer.zero_grad(set_to_none=True)
        self.noise.set_state(state)

    def _loop(self, batches: Prefetcher[Pictures], log: RunLog, stop: StopRequest) -> None:
        config = self.config
        now = time.monotonic()
        saved = validated = now
        window_start, window_steps, waited = now, 0, 0.0
        while not self.progress.done and not stop.requested:
            began = time.monotonic()
            pictures = next(batches)
            waited += time.monotonic() - began
            logs = self._step(to_tensor(pictures, self.device, config.channels_last))
            window_steps += 1
            now = time.monotonic()
            if self.progress.step % config.log_every == 0:
                rate = window_steps * config.batch_size / (now - window_start)
                logs |= {"pictures_per_second": rate, "waiting_share": waited / (now - window_start)}
                log.scalars(self.progress.step, logs, "train/")
                left = duration(self.progress.remaining_seconds)
                self.console.print(
                    f"step {self.progress.step}  {100 * self.progress.fraction:.1f} %  loss {logs['loss']:.4f}  "
                    f"psnr {logs['psnr']:.2f} dB  {rate:.0f} pictures/s  left {left}",
                    highlight=False,
                )
                window_start, window_steps, waited = now, 0, 0.0
            if now - validated >= 60 * config.validation_minutes:
                self.validate(log)
                validated = now = time.monotonic()
                window_start, window_steps, waited = now, 0, 0.0
            if now - saved >= 60 * config.run.checkpoint_minutes:
                self.save()
                saved = time.monotonic()

    @torch.no_grad()
    def validate(self, log: RunLog | None = None) -> dict[str, float]:
        """PSNR in dB per kind of held-out picture, with the averaged weights; writes a sample grid."""
        self.model.eval()
        scores: dict[str, float] = {}
        rows: list[list[Pictures]] = []
        # Other shapes and modes than in training: compiling them would cost minutes for a few passes.
        with self.ema.applied(), torch.compiler.set_stance("force_eager"):
            for kind, pictures in self.validation.items():
                outputs = []
                for start in range(0, len(pictures), self.config.batch_size):
                    images = to_tensor(pictures[start : start + self.config.batch_size], self.device)
                    outputs.append(to_pictures(self.model.decode(self.model.encode(images))))
                result = np.concatenate(outputs)
                error = ((result.astype(np.float64) - pictures) / 255) ** 2
                scores[kind] = float((-10 * np.log10(error.mean((1, 2, 3)) + 1e-9)).mean())
                shown = 8 if kind == "scene" else 4
                if kind in ("scene", "depth", "segment", "edges"):
                    rows += [list(pictures[:shown]), list(result[:shown])]
        self.model.train()
        self.best = scores
        if log is not None:
            log.scalars(self.progress.step, scores, "validation/psnr_")
            log.image(self.progress.step, "reconstruction", grid(rows))
            shown_scores = "  ".join(f"{kind} {value:.2f}" for kind, value in scores.items())
            self.console.print(f"validation at step {self.progress.step}, PSNR in dB: {shown_scores}", highlight=False)
        return scores

    def finish(self, log: RunLog | None = None) -> Path:
        """Take the averaged weights, measure the latent statistics, validate, save; returns the weights folder."""
        self.ema.copy_to_model()
        self.model.eval()
        scores = self.validate(log)
        self.model.eval()
        if not self.config.decoder_only:
            with torch.compiler.set_stance("force_eager"):
                self.model.calibrate(self._sample_batches(max(1, 2048 // self.config.batch_size)))
        self.model.to(memory_format=torch.contiguous_format)
        folder = self.folder / "autoencoder"
        self.model.save_pretrained(folder)
        rows = [[kind, f"{value:.2f}"] for kind, value in scores.items()]
        seen = self.progress.step * self.config.batch_size
        text = (
            f"# Autoencoder run `{self.config.run.name}`\n\n"
            f"{self.progress.step} steps, {seen} pictures, {duration(self.progress.elapsed)}; {self.skipped} steps "
            f"skipped. The weights in `autoencoder/` are the moving average.\n\n"
            "Peak signal-to-noise ratio on held-out pictures:\n\n" + table(["kind", "PSNR, dB"], rows) + "\n"
        )
        write_text(self.folder / "summary.md", text)
        self.console.print(f"Finished: weights in {folder}, summary in {self.folder / 'summary.md'}.")
        return folder


def train_autoencoder(config: AutoencoderConfig, console: Console | None = None) -> Path:
    """Train (or continue) the run that ``config`` describes; returns the weights folder."""
    return AutoencoderTrainer(config, console).train()


def main(arguments: list[str] | None = None) -> int:
    """Command line: a configuration file, then ``key=value`` overrides."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments:
            raise ConfigError("Usage: python -m unialignment.training.autoencoder CONFIG.yaml [key=value ...]")
        config = load_config(arguments[0], arguments[1:])
        if not isinstance(config, AutoencoderConfig):
            raise ConfigError(f"{arguments[0]} is of kind {config.kind!r}; this command trains kind 'autoencoder'.")
        train_autoencoder(config)
    except UniAlignmentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
