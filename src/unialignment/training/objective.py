"""The training loss of DESIGN section 4, over batches of any mixture of tasks.

    L = L_image + w_text·L_text + w_cross·L_cross + w_intrinsic·(L_intrinsic_image + L_intrinsic_text)

Holds what is trained (transformer, text embedder, alignment projectors). Knows nothing of optimizers, data or tasks by
name: a batch says what is condition and what is target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from unialignment.alignment.losses import intrinsic_loss
from unialignment.alignment.pairs import Contrast, Exchange
from unialignment.alignment.projectors import AlignmentProjector
from unialignment.diffusion import FlowPath, MaskedPath
from unialignment.diffusion.base import PathSample
from unialignment.errors import ConfigError
from unialignment.model.cache import TransformerOutput
from unialignment.model.tokenizer import encode_conditions
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.training.batching import Batch
from unialignment.training.sharing import Share

T = TypeVar("T")
PairGradients = list[tuple[Tensor | None, Tensor | None]]
"""By batch: the contrastive loss's gradient by its picture and its text embeddings ``[b, E]``."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights and forms of the losses.

    Attributes:
        image: Weight of the image diffusion loss.
        text: Weight of the text diffusion loss.
        cross: Weight of the contrastive loss.
        intrinsic: Weight of each intrinsic alignment loss.
        temperature: τ of the contrastive loss.
        cross_form: ``"condition"`` (ours, ``prefix`` only): the pair is a text seen as condition of an image pass and
            a picture seen as condition of a text pass, neither of which has seen the other. ``"published"``: both
            streams of one image pass, which have attended to each other.
        feature_layer: 1-based block of the intrinsic loss; ``None``: a third of the depth, as published (8 of 24).
        per_token: Intrinsic loss on every token (REPA) instead of their mean.
        published_projector: End the projector with its activation, as the published code does.
        image_teacher_dim: Width of the image teacher's embeddings; 0: no image teacher.
        text_teacher_dim: Width of the text teacher's embeddings; 0: no text teacher.
        projector_dim: Hidden width of the projectors.
        draws: Noise levels each target is denoised at in a step (``prefix`` only): conditions are encoded once and
            shared, so that a further draw costs the target's tokens alone. The loss of a sample is the mean over them.
        negatives: What a pair is told apart from: the other pairs of its ``"micro_batch"``, or of the whole ``"step"``.
    """

    image: float = 1.0
    text: float = 0.2
    cross: float = 0.05
    intrinsic: float = 0.1
    temperature: float = 0.07
    cross_form: str = "condition"
    feature_layer: int | None = None
    per_token: bool = False
    published_projector: bool = False
    image_teacher_dim: int = 0
    text_teacher_dim: int = 0
    projector_dim: int = 512
    draws: int = 1
    negatives: str = "micro_batch"


@dataclass
class ObjectiveOutput:
    """Total loss (with gradient), and its parts by name.

    Attributes:
        loss: Scalar, with gradient.
        logs: Parts and other numbers, without gradient.
        parts: The weighted terms of ``loss``, with gradient.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Computes the loss of a training step.

    Args:
        transformer: The model.
        text_embedder: Object with ``embed(ids, mask) -> [B, L, D]``; trained when it is a module with parameters that
            require gradients.
        autoencoder: Frozen; ``encode(images) -> latents``.
        tokenizer: For the empty prompt of :meth:`prompt_gap`.
        flow: Diffusion of pictures.
        masked: Diffusion of text.
        settings: Weights and forms.

    Raises:
        ConfigError: ``cross_form`` doesn't fit the attention mode.
    """

    def __init__(
        self,
        transformer: UniAlignmentTransformer,
        text_embedder: Any,
        autoencoder: Any,
        tokenizer: Any,
        flow: FlowPath,
        masked: MaskedPath,
        settings: ObjectiveSettings,
    ) -> None:
        super().__init__()
        if settings.cross_form not in ("condition", "published"):
            raise ConfigError(f"cross_form={settings.cross_form!r} is unknown: use 'condition' or 'published'.")
        if settings.cross and settings.cross_form == "condition" and transformer.config.attention_mode != "prefix":
            raise ConfigError(
                "cross_form='condition' needs attention_mode='prefix': in 'joint' mode conditions have attended to "
                "their pair. Use cross_form='published' or loss.cross=0."
            )
        if settings.draws > 1 and transformer.config.attention_mode != "prefix":
            raise ConfigError("loss.draws > 1 needs attention_mode='prefix': only there can conditions be shared.")
        self.transformer = transformer
        self.text_embedder = text_embedder
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.flow, self.masked, self.settings = flow, masked, settings
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.projectors = nn.ModuleDict(
            {
                stream: AlignmentProjector(
                    width,
                    dim,
                    settings.projector_dim,
                    pool=not settings.per_token,
                    published=settings.published_projector,
                )
                for stream, dim in (("image", settings.image_teacher_dim), ("text", settings.text_teacher_dim))
                if dim and settings.intrinsic
            }
        )
        self.feature_layer = settings.feature_layer or max(1, round(transformer.config.num_layers / 3))
        self.exchange = Exchange()

    @property
    def _wants_features(self) -> bool:
        return bool(self.projectors)

    def trainable(self) -> nn.ModuleDict:
        """The modules to optimize, average and save, by component name."""
        return nn.ModuleDict(
            {
                name: module
                for name, module in (
                    ("transformer", self.transformer),
                    ("text_embedder", self.text_embedder),
                    ("projectors", self.projectors),
                )
                if isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters())
            }
        )

    def forward(
        self,
        batches: Sequence[Batch | Share],
        generator: torch.Generator | None = None,
        pair_gradients: PairGradients | None = None,
    ) -> ObjectiveOutput:
        """Loss of one micro-batch.

        Every sample counts the same within its target kind, whatever batch it came in. Of shares, the loss is this
        process's part times the number of parts: the mean over processes is the loss of the whole, its gradient too.

        Args:
            batches: From :func:`~unialignment.training.batching.collate`, or shares of them.
            generator: CPU generator of times, noise and masks; at the same state in all processes.
            pair_gradients: With ``negatives="step"``: what
                :func:`~unialignment.alignment.pairs.cached_gradients` found, already scaled for this process.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        by_task: dict[str, list[Tensor]] = defaultdict(list)
        task_counts: dict[str, int] = defaultdict(int)
        intrinsic: dict[str, list[Tensor]] = defaultdict(list)
        contrast = Contrast(self.settings.temperature, self.exchange)
        scale = 1
        for index, item in enumerate(batches):
            share = item if isinstance(item, Share) else None
            batch = item.batch if isinstance(item, Share) else item
            tasks = batch.tasks if share is None else share.tasks
            losses, output = self.batch_loss(item, generator)
            if share is not None:
                scale = share.parts
                if not losses.requires_grad and torch.is_grad_enabled():
                    losses = losses + _touch(output)  # every process must take part in every backward pass
            sums[batch.target] = sums.get(batch.target, 0) + (losses * batch.weights.to(losses)).sum()
            counts[batch.target] += len(tasks)
            for task in dict.fromkeys(tasks):
                chosen = torch.tensor([t == task for t in batch.tasks])
                if share is not None:
                    chosen &= share.valid
                by_task[task].append(losses.detach()[chosen.to(losses.device)])
                task_counts[task] += sum(t == task for t in tasks)
            self._collect_pairs(batch, output, contrast, pair_gradients[index] if pair_gradients else (None, None))
            self._collect_intrinsic(item, output, intrinsic)
        parts: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        for target, weight in (("image", self.settings.image), ("text", self.settings.text)):
            if target in sums:
                part = scale * sums[target] / max(1, counts[target])
                logs[f"loss/{target}"] = part.detach()
                parts[target] = weight * part
        for task, values in by_task.items():
            found = torch.cat(values)
            logs[f"task/{task}"] = found.mean() if scale == 1 else scale * found.sum() / task_counts[task]
        if (accuracy := contrast.compare()) is not None:
            logs["cross/accuracy"] = accuracy
        if contrast.losses:
            part = torch.stack(contrast.losses)
            part = part.mean() if pair_gradients is None else part.sum()
            if pair_gradients is None:
                logs["loss/cross"] = part.detach()
            parts["cross"] = self.settings.cross * part
        for stream, pieces in intrinsic.items():
            part = torch.stack(pieces).mean()
            logs[f"loss/intrinsic_{stream}"] = part.detach()
            parts[f"intrinsic_{stream}"] = self.settings.intrinsic * part
        assert parts, "a step needs at least one batch"
        total: Tensor | float = 0.0
        for part in parts.values():
            total = total + part
        assert isinstance(total, Tensor)
        # A surrogate has the right gradient and a value without meaning; the trainer adds the loss that it stands for.
        meaningful = total if pair_gradients is None or "cross" not in parts else total - parts["cross"]
        logs["loss/total"] = meaningful.detach()
        return ObjectiveOutput(total, logs, parts)

    def within(self, function: Callable[[], T]) -> T:
        """Run a function as a pass of this module, so that whatever is applied to its passes applies to it too."""
        return function()

    @torch.no_grad()
    def pair_features(
        self, batches: Sequence[Batch | Share], generator: torch.Generator | None = None
    ) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """What :func:`~unialignment.alignment.pairs.cached_gradients` needs of one micro-batch.

        Args:
            batches: As for :meth:`forward`.
            generator: At the state that :meth:`forward` will find it in.

        Returns:
            By batch: pair ids ``[b]``, picture and text embeddings ``[b, E]`` or ``None``.
        """
        result: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        for item in batches:
            batch = item.batch if isinstance(item, Share) else item
            if self.settings.cross_form == "published":
                _, output = self.batch_loss(item, generator)  # noise and all: both streams have seen the target
            else:
                output = TransformerOutput()
                if self._pair_sides(batch) != (False, False):
                    _, sources = self._latents(batch)
                    prompt = self._prompt(batch)
                    output = self.transformer.prefill(
                        text_embeds=prompt, text_mask=batch.prompt_mask, images=sources, features=True
                    ).output
            image, text = self._pair_embeddings(batch, output)
            result.append((batch.pair_ids, image, text))
        return result

    def batch_loss(
        self, item: Batch | Share, generator: torch.Generator | None = None
    ) -> tuple[Tensor, TransformerOutput]:
        """Per-sample diffusion loss ``[b]`` of one batch, and the features of each sample's first draw."""
        batch = item.batch if isinstance(item, Share) else item
        draws = self._draws(batch)
        target, sources = self._latents(batch)
        prompt = self._prompt(batch)
        rows = torch.arange(len(batch)).repeat_interleave(draws)
        places, count = rows, len(rows)  # where these draws stand among those of the whole batch
        if isinstance(item, Share):
            places = (item.rows[:, None] * draws + torch.arange(draws)).flatten()
            count = item.total * draws
        process: FlowPath | MaskedPath
        if batch.target == "image":
            assert target is not None
            process = self.flow
            path = self._noised_pictures(target[rows], places, count, generator)
            noised: dict[str, Any] = {"latents": path.noised}
        else:
            assert batch.target_ids is not None
            process = self.masked
            maskable = None if batch.maskable is None else batch.maskable[rows]
            path = self._masked_texts(batch.target_ids[rows], maskable, places, count, generator)
            embeds = self.text_embedder.embed(path.noised, None)
            noised = {"text_embeds": embeds, "logit_positions": path.corrupted}
        output = self._denoise(batch, prompt, sources, noised, path.timestep.to(prompt.device), rows)
        prediction = output.velocity if batch.target == "image" else output.text_logits
        assert prediction is not None
        return process.loss(prediction, path).view(len(batch), draws).mean(1), output

    def _noised_pictures(
        self, clean: Tensor, places: Tensor, count: int, generator: torch.Generator | None
    ) -> PathSample:
        """Noised latents; of shares, with the times and noise that these rows have in the whole batch."""
        time = self.flow.sample_time(count, generator)
        if count == len(places):
            return self.flow.sample_path(clean, time, generator)
        noise = torch.randn((count, *clean.shape[1:]), generator=generator, dtype=clean.dtype)
        return self.flow.sample_path(clean, time[places], None, noise[places].to(clean.device))

    def _masked_texts(
        self, clean: Tensor, maskable: Tensor | None, places: Tensor, count: int, generator: torch.Generator | None
    ) -> PathSample:
        """Masked texts; of shares, with the times and masks that these rows have in the whole batch."""
        time = self.masked.sample_time(count, generator)
        if count == len(places):
            return self.masked.sample_path(clean, time, generator, maskable)
        whole = self.masked.sample_path(clean.new_zeros(count, clean.shape[1]), time, generator)
        assert whole.corrupted is not None
        corrupted = whole.corrupted[places.to(clean.device)]
        if maskable is not None:
            corrupted = corrupted & maskable
        noised = torch.where(corrupted, self.masked.mask_id, clean)
        return PathSample(clean, noised, time[places], torch.zeros(len(places)), corrupted=corrupted)

    def _draws(self, batch: Batch) -> int:
        # Sharing pays where the conditions are dear; without a source another prompt teaches more than another draw.
        return self.settings.draws if batch.sources else 1

    def _denoise(
        self,
        batch: Batch,
        prompt: Tensor,
        sources: list[Tensor],
        noised: dict[str, Any],
        timestep: Tensor,
        rows: Tensor,
    ) -> TransformerOutput:
        """The transformer's pass over the noised targets of a batch, ``rows`` saying whose conditions each has."""
        layer = self.feature_layer if self._wants_features else None
        image_target = batch.target == "image"
        if self.transformer.config.attention_mode == "joint":
            text = {"text_embeds": prompt, "text_mask": batch.prompt_mask}
            question = {"condition_text_embeds": prompt, "condition_text_mask": batch.prompt_mask}
            images = {"sources": sources} if image_target else {"latents": sources[0], "sources": sources[1:]}
            output: TransformerOutput = self.transformer(
                **noised,
                **(text if image_target else question),
                **(images if sources else {}),
                timestep=timestep,
                target=batch.target,
                feature_layer=layer,
            )
            return output
        cache = self.transformer.prefill(
            text_embeds=prompt,
            text_mask=batch.prompt_mask,
            images=sources,
            feature_layer=layer,
            features=self._paired(batch),
        )
        shared = cache if len(rows) == len(batch) else cache.select(rows.to(prompt.device))
        output = self.transformer.denoise(shared, **noised, timestep=timestep, feature_layer=layer)
        first = slice(None, None, self._draws(batch))
        own, other = ("image", "text") if image_target else ("text", "image")
        for name in (f"{own}_features", f"mid_{own}_features"):
            value = getattr(output, name)
            setattr(output, name, None if value is None else value[first])
        for name in (f"{other}_features", f"mid_{other}_features"):
            setattr(output, name, getattr(cache.output, name))
        return output

    def _prompt(self, batch: Batch) -> Tensor:
        """Embedded condition texts ``[B, L, D]``, from the feature cache if the batch has them."""
        if batch.prompt_embeds is not None:
            return batch.prompt_embeds
        embedded: Tensor = self.text_embedder.embed(batch.prompt_ids, batch.prompt_mask)
        return embedded

    def _latents(self, batch: Batch) -> tuple[Tensor | None, list[Tensor]]:
        """Target (if a picture) and source latents, in one autoencoder pass when sizes agree."""
        if batch.encoded:
            return batch.target_images, list(batch.sources)
        images = ([] if batch.target_images is None else [batch.target_images]) + list(batch.sources)
        if not images:
            return None, []
        with torch.no_grad():
            if len({tuple(image.shape) for image in images}) == 1:
                latents = list(self.autoencoder.encode(torch.cat(images)).float().chunk(len(images)))
            else:
                latents = [self.autoencoder.encode(image).float() for image in images]
        return (None, latents) if batch.target_images is None else (latents[0], latents[1:])

    def frozen_passes(self, batches: Sequence[Batch | Share]) -> None:
        """What :meth:`forward` does without gradient, and nothing else: frozen encoders on their inputs."""
        trained = "text_embedder" in self.trainable()
        for item in batches:
            batch = item.batch if isinstance(item, Share) else item
            self._latents(batch)
            if not trained:
                self._prompt(batch)

    def _pair_sides(self, batch: Batch) -> tuple[bool, bool]:
        """Whether a batch gives picture and text embeddings to the contrastive loss."""
        if not self.settings.cross:
            return False, False
        plain = batch.target == "image" and not batch.sources
        if self.settings.cross_form == "published":
            return plain, plain
        return batch.target == "text" and len(batch.sources) == 1, plain

    def _paired(self, batch: Batch) -> bool:
        """Whether a batch has pairs; within a group of processes all must compute alike, whoever holds them."""
        return self._pair_sides(batch) != (False, False) and (
            self.exchange.parts > 1 or bool((batch.pair_ids >= 0).any())
        )

    def _pair_embeddings(self, batch: Batch, output: TransformerOutput) -> tuple[Tensor | None, Tensor | None]:
        """Picture and text embeddings ``[b, E]``, unit vectors, where :meth:`_pair_sides` says so."""
        picture, words = self._pair_sides(batch)
        image = text = None
        if picture and output.image_features is not None:
            image = self.transformer.embed(output.image_features, "image")
        if words and output.text_features is not None:
            text = self.transformer.embed(output.text_features, "text", batch.prompt_mask)
        return image, text

    def _collect_pairs(
        self,
        batch: Batch,
        output: TransformerOutput,
        contrast: Contrast,
        gradients: tuple[Tensor | None, Tensor | None],
    ) -> None:
        if not self._paired(batch):
            return
        image, text = self._pair_embeddings(batch, output)
        if self.settings.negatives == "step":
            for embedded, gradient in zip((image, text), gradients, strict=True):
                if embedded is not None and gradient is not None:
                    contrast.losses.append((embedded * gradient.to(embedded)).sum())
        elif self.settings.cross_form == "published":
            assert image is not None
            assert text is not None
            contrast.compare_within(batch.pair_ids, image, text)
        elif text is not None:
            contrast.texts.add(batch.pair_ids, text)
        elif image is not None:
            contrast.images.add(batch.pair_ids, image)

    def _collect_intrinsic(
        self, item: Batch | Share, output: TransformerOutput, intrinsic: dict[str, list[Tensor]]
    ) -> None:
        """Each stream is pulled towards its teacher in the pass in which it is the target."""
        batch = item.batch if isinstance(item, Share) else item
        for stream, teacher, hidden in (
            ("image", batch.image_teacher, output.mid_image_features),
            ("text", batch.text_teacher, output.mid_text_features),
        ):
            if batch.target != stream or teacher is None or stream not in self.projectors:
                continue
            predicted = self.projectors[stream](hidden)
            if not isinstance(item, Share):
                intrinsic[stream].append(intrinsic_loss(predicted, teacher.to(predicted)))
                continue
            mask = item.valid.to(predicted.device)
            whole = int(item.valid.sum()) * item.parts / item.total
            mask = mask if predicted.ndim == 2 else mask[:, None].expand(predicted.shape[:2])
            intrinsic[stream].append(whole * intrinsic_loss(predicted, teacher.to(predicted), mask))

    @torch.no_grad()
    def prompt_gap(
        self, batches: list[Batch], times: tuple[float, ...] = (0.95, 0.99), seed: int = 0
    ) -> dict[str, float]:
        """Denoising error at high noise with the right and with an empty prompt, by task.

        Prompts matter at high noise only, so the mean loss says nothing about whether they are followed; this does.

        Returns:
            ``gap/<task>/<t>/right``, ``…/empty`` (velocity mean squared errors) and ``…/gap`` (their difference).
        """
        values: dict[str, list[Tensor]] = defaultdict(list)
        for batch in batches:
            if batch.target != "image":
                continue
            target, sources = self._latents(batch)
            assert target is not None
            empty_ids, empty_mask = encode_conditions(self.tokenizer, [""] * len(batch))
            prompts = {
                "right": (batch.prompt_ids, batch.prompt_mask),
                "empty": (empty_ids.to(batch.prompt_ids.device), empty_mask.to(batch.prompt_ids.device)),
            }
            for time in times:
                generator = torch.Generator().manual_seed(seed)
                path = self.flow.sample_path(target, torch.full((len(batch),), time), generator)
                assert path.noise is not None
                for name, (ids, mask) in prompts.items():
                    output = self.transformer(
                        text_embeds=self.text_embedder.embed(ids, mask),
                        text_mask=mask,
                        latents=path.noised,
                        sources=sources,
                        timestep=path.timestep.to(path.noised.device),
                        condition_features=False,
                    )
                    error = (output.velocity.float() - (path.noise - path.clean).float()).square().flatten(1).mean(1)
                    for task in dict.fromkeys(batch.tasks):
                        chosen = torch.tensor([t == task for t in batch.tasks], device=error.device)
                        values[f"gap/{task}/{time}/{name}"].append(error[chosen])
        result = {key: float(torch.cat(parts).mean()) for key, parts in values.items()}
        for key in [k for k in result if k.endswith("/right")]:
            stem = key.removesuffix("right")
            result[stem + "gap"] = result[stem + "empty"] - result[key]
        return result


def _touch(output: TransformerOutput) -> Tensor:
    """Zero, with a gradient path into whatever the pass computed."""
    values = [value for value in (output.velocity, output.text_logits) if value is not None]
    return sum((value.float().sum() * 0 for value in values), torch.zeros(()))
