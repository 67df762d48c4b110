"""A teacher's guided trajectories from noise to picture, computed once and kept as files to learn from.

What a few-step student has to learn is where the teacher's own sampler goes: with guidance, from noise, in as many
steps as it is used with. So that is what is stored: the points where a student's steps begin and end, with the
conditions as tensors. Targets are then free of noise, the student sees the states that it will be in (not noised data,
from which guided trajectories stray), and several epochs cost the teacher nothing. Knows nothing of students.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unialignment.diffusion import Guidance, sigma_schedule
from unialignment.errors import CheckpointError, ConfigError
from unialignment.model.tokenizer import encode_conditions
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.storage import atomic_file
from unialignment.training.batching import Batch

Source = Callable[[int, str], list[Batch]]
"""``(i, "image" or "text") -> batches`` of call ``i`` with that kind of target, a function of both alone."""
Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x [N, C, H, W], σ [N] or [1], rows [N] or None) -> velocity [N, C, H, W]``; rows: whose conditions each has."""


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of samples of one signature.

    Attributes:
        tasks: Task of each sample.
        prompt_ids: ``[B, L]`` condition text.
        prompt_mask: Bool ``[B, L]``.
        sources: Latents of condition pictures, each ``[B, C, h, w]``.
        points: ``[K + 1, B, C, H, W]`` from noise (first) to picture (last), at the noise levels of ``grid``.
        grid: ``[K + 1]`` noise levels.
    """

    tasks: tuple[str, ...]
    prompt_ids: Tensor
    prompt_mask: Tensor
    sources: tuple[Tensor, ...]
    points: Tensor
    grid: Tensor

    def __len__(self) -> int:
        return len(self.tasks)


def velocity_of(
    model: UniAlignmentTransformer, prompt: Tensor, mask: Tensor, pictures: tuple[Tensor, ...], dtype: torch.dtype
) -> Velocity:
    """The velocity that a model predicts under conditions, which are encoded once where they can be.

    Args:
        model: The model.
        prompt: ``[B, L, D]`` embedded.
        mask: Bool ``[B, L]``.
        pictures: Latents, each ``[B, C, h, w]``.
        dtype: Of the model's inputs.
    """
    if model.config.attention_mode == "prefix":
        cache = model.prefill(text_embeds=prompt, text_mask=mask, images=pictures)

        def cached(x: Tensor, sigma: Tensor, rows: Tensor | None) -> Tensor:
            own = cache if rows is None else cache.select(rows)
            found = model.denoise(own, latents=x.to(dtype), timestep=1000.0 * sigma).velocity
            assert found is not None
            return found.float()

        return cached

    def whole(x: Tensor, sigma: Tensor, rows: Tensor | None) -> Tensor:
        def pick(tensor: Tensor) -> Tensor:
            return tensor if rows is None else tensor[rows]

        output = model(
            text_embeds=pick(prompt),
            text_mask=pick(mask),
            latents=x.to(dtype),
            sources=tuple(pick(picture) for picture in pictures),
            timestep=(1000.0 * sigma).expand(len(x)),
            target="image",
        )
        found: Tensor = output.velocity.float()
        return found

    return whole


class Teacher:
    """Draws trajectories as the pipeline's own sampler would.

    Args:
        pipe: The model.
        windows: Points to keep of each, less one: steps of the student.
        guidance: Guidance scale by task; where absent the model's own default.
        shift: Resolution shift of the noise levels; ``None``: each task's own.

    Raises:
        ConfigError: A scale is unusable, or the model's own sampler does what a student can't be taught here.
    """

    def __init__(
        self, pipe: UniAlignmentPipeline, windows: int, guidance: Mapping[str, float], shift: float | None
    ) -> None:
        self.pipe, self.windows = pipe, windows
        self.scales: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.shifts: dict[str, float] = {}
        for name in pipe.tasks.names:
            task = pipe.tasks.get(name)
            if task.target != "image":
                continue
            own = {**task.sampling, **pipe.sampling.get(name, {})}
            self.scales[name] = float(guidance.get(name, own.get("guidance_scale", 1.0)))
            self.steps[name] = int(own.get("num_inference_steps", 20))
            self.shifts[name] = float(own.get("shift", 1.0)) if shift is None else shift
            Guidance(self.scales[name])  # refuses what isn't a scale
            if own.get("image_guidance_scale", 1.0) != 1.0:
                raise ConfigError(
                    f"the model's defaults for {name} guide on source pictures (image_guidance_scale="
                    f"{own['image_guidance_scale']}), which no stage teaches; set it to 1 in model_index.json"
                )

    def describe(self) -> dict[str, Any]:
        """What the trajectories depend on besides the samples; JSON."""
        weights = 0.0
        for parameter in self.pipe.transformer.parameters():
            weights += float(parameter.detach().double().abs().sum())
        return {
            "model": self.pipe.name,
            "weights": f"{weights:.6f}",
            "windows": self.windows,
            "guidance": self.scales,
            "steps": self.steps,
            "shifts": self.shifts,
        }

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        """Latents of a batch's condition pictures."""
        # In full precision, as the pipeline encodes them: it is a hundredth of a trajectory's work.
        with torch.autocast(self.pipe.device.type, enabled=False):
            return tuple(self.pipe.autoencoder.encode(source.to(self.pipe.device)).float() for source in batch.sources)

    @torch.no_grad()
    def draw(self, batch: Batch, generator: torch.Generator) -> Trajectories:
        """The trajectories of a batch's samples from noise of ``generator``.

        A window is solved in as many Euler steps as make the task's default number, rounded up.

        Raises:
            ConfigError: Tasks that share the batch have different shifts.
        """
        pipe, device = self.pipe, self.pipe.device
        assert batch.target_images is not None
        sources = self.conditions(batch)
        side = batch.target_images.shape[-2] // pipe.autoencoder.spatial_factor
        wide = batch.target_images.shape[-1] // pipe.autoencoder.spatial_factor
        shape = (len(batch), pipe.transformer.config.in_channels, side, wide)
        velocity = self._guided(batch, sources)
        inner = -(-max(self.steps[task] for task in batch.tasks) // self.windows)
        shifts = {task: self.shifts[task] for task in batch.tasks}
        if len(set(shifts.values())) > 1:
            raise ConfigError(
                f"tasks that are drawn together have different shifts by the model's defaults ({shifts}); say which "
                "one with shift=…"
            )
        fine = sigma_schedule(self.windows * inner, self.shifts[batch.tasks[0]])
        x = torch.randn(shape, generator=generator).to(device)
        points = [x]
        for number, (here, there) in enumerate(pairwise(fine)):
            x = x + (there - here) * velocity(x, torch.full((1,), here, device=device), None)
            if (number + 1) % inner == 0:
                points.append(x)
        return Trajectories(
            tasks=batch.tasks,
            prompt_ids=batch.prompt_ids,
            prompt_mask=batch.prompt_mask,
            sources=sources,
            points=torch.stack(points),
            grid=torch.tensor(fine[::inner]),
        )

    def _guided(self, batch: Batch, sources: tuple[Tensor, ...]) -> Velocity:
        pipe, dtype = self.pipe, self.pipe.dtype
        ids, mask = batch.prompt_ids.to(pipe.device), batch.prompt_mask.to(pipe.device)
        pictures = tuple(source.to(dtype) for source in sources)
        prompt = pipe.text_embedder.embed(ids, mask).to(dtype)
        full = velocity_of(pipe.transformer, prompt, mask, pictures, dtype)
        scales = torch.tensor([self.scales[task] for task in batch.tasks], device=pipe.device)
        if not bool((scales != 1.0).any()):
            return full
        ids, mask = (each.to(pipe.device) for each in encode_conditions(pipe.tokenizer, [""] * len(batch)))
        empty = pipe.text_embedder.embed(ids, mask).to(dtype)
        without = velocity_of(pipe.transformer, empty, mask, pictures, dtype)
        weight = scales.view(-1, 1, 1, 1)
        return lambda x, sigma, rows: torch.lerp(without(x, sigma, rows), full(x, sigma, rows), weight)


class TrajectoryStore:
    """Files of trajectories, each complete or absent: one for every call of a source of batches.

    Args:
        folder: Where they are.
        identity: What they depend on (:meth:`Teacher.describe` and what else).

    Raises:
        ConfigError: The folder holds those of another teacher or other settings.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.dumps(identity, sort_keys=True)
        first = self.path(0)
        if first.exists() and self._metadata(first).get("identity") != self.identity:
            raise ConfigError(f"{folder} holds trajectories of another teacher or other settings; remove it")

    def path(self, number: int) -> Path:
        """File of call ``number``."""
        return self.folder / f"{number:06d}.safetensors"

    def count(self) -> int:
        """How many there are, from the first without a gap."""
        number = 0
        while self.path(number).exists():
            number += 1
        return number

    def seconds(self) -> float:
        """What computing them took."""
        return sum(float(self._metadata(self.path(number))["seconds"]) for number in range(self.count()))

    def write(self, number: int, parts: list[Trajectories], seconds: float) -> None:
        """Store what came of call ``number``.

        Raises:
            StorageError: It can't be written.
        """
        tensors: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            named = {"ids": part.prompt_ids, "mask": part.prompt_mask, "points": part.points, "grid": part.grid}
            named |= {f"source.{place}": source for place, source in enumerate(part.sources)}
            tensors |= {f"{index}.{name}": tensor.cpu().contiguous().clone() for name, tensor in named.items()}
        metadata = {
            "identity": self.identity,
            "tasks": json.dumps([part.tasks for part in parts]),
            "seconds": repr(seconds),
        }
        with atomic_file(self.path(number)) as file:
            file.write(save(tensors, metadata))

    def read(self, number: int) -> list[Trajectories]:
        """The inverse of :meth:`write`.

        Raises:
            CheckpointError: It is damaged.
        """
        path, parts = self.path(number), []
        try:
            with safe_open(str(path), framework="pt") as file:
                names = set(file.keys())
                for index, tasks in enumerate(json.loads((file.metadata() or {})["tasks"])):
                    sources = sum(name.startswith(f"{index}.source.") for name in names)
                    ids, mask, points, grid, *rest = (
                        file.get_tensor(f"{index}.{name}")
                        for name in ("ids", "mask", "points", "grid", *(f"source.{i}" for i in range(sources)))
                    )
                    parts.append(Trajectories(tuple(tasks), ids, mask, tuple(rest), points, grid))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it: it will be computed anew") from error
        return parts

    def _metadata(self, path: Path) -> dict[str, str]:
        try:
            with safe_open(str(path), framework="pt") as file:
                return dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it: it will be computed anew") from error


def compute(
    teacher: Teacher,
    store: TrajectoryStore,
    source: Source,
    wanted: int,
    seed: int,
    budget: float | None,
    say: Callable[[str], None],
) -> int:
    """Computes what is missing of ``wanted`` files; returns how many there are.

    Args:
        teacher: Who draws.
        store: Where to.
        source: Batches.
        wanted: Files.
        seed: Of the noise; file ``i`` depends on the seed and ``i`` alone.
        budget: Seconds for all of them, those of earlier sessions included, of which two files are made at least
            (one is held out); ``None``: no limit.
        say: Receives a line now and then.
    """
    done, spent = store.count(), store.seconds()
    while done < wanted and (budget is None or spent < budget or done < 2):
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + done)
        parts = [teacher.draw(batch, generator) for batch in source(done, "image")]
        seconds = time.perf_counter() - began
        store.write(done, parts, seconds)
        done, spent = done + 1, spent + seconds
        if done % 10 == 0 or done == wanted:
            say(f"trajectories: {done} of {wanted} files, {spent:.0f} s")
    return done
