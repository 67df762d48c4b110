"""The training loss of DESIGN section 4, over batches of any mixture of tasks.

    L = L_image + w_text·L_text + w_cross·L_cross + w_intrinsic·(L_intrinsic_image + L_intrinsic_text)

Holds what is trained (transformer, text embedder, alignment projectors). Knows nothing of optimizers, data or tasks by
name: a batch says what is condition and what is target.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unialignment.alignment.losses import contrastive_loss, intrinsic_loss
from unialignment.alignment.projectors import AlignmentProjector
from unialignment.diffusion import FlowPath, MaskedPath
from unialignment.errors import ConfigError
from unialignment.model.cache import TransformerOutput
from unialignment.model.tokenizer import encode_conditions
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.training.batching import Batch


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


@dataclass
class ObjectiveOutput:
    """Total loss (with gradient) and its parts as tensors without gradient, by name."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


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

    def forward(self, batches: list[Batch], generator: torch.Generator | None = None) -> ObjectiveOutput:
        """Loss of one step's batches.

        Every sample counts the same within its target kind, whatever batch it came in.

        Args:
            batches: From :func:`~unialignment.training.batching.collate`.
            generator: CPU generator of times, noise and masks.
        """
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        by_task: dict[str, list[Tensor]] = defaultdict(list)
        intrinsic: dict[str, list[Tensor]] = defaultdict(list)
        text_pairs: dict[int, Tensor] = {}
        image_pairs: dict[int, Tensor] = {}
        cross: list[Tensor] = []
        for batch in batches:
            losses, output = self.batch_loss(batch, generator)
            sums[batch.target] = sums.get(batch.target, 0) + (losses * batch.weights.to(losses)).sum()
            counts[batch.target] += len(batch)
            for task in dict.fromkeys(batch.tasks):
                chosen = torch.tensor([t == task for t in batch.tasks])
                by_task[task].append(losses.detach()[chosen.to(losses.device)])
            self._collect_pairs(batch, output, text_pairs, image_pairs, cross)
            self._collect_intrinsic(batch, output, intrinsic)
        total: Tensor | float = 0.0
        logs: dict[str, Tensor] = {}
        for target, weight in (("image", self.settings.image), ("text", self.settings.text)):
            if counts[target]:
                part = sums[target] / counts[target]
                logs[f"loss/{target}"] = part.detach()
                total = total + weight * part
        for task, values in by_task.items():
            logs[f"task/{task}"] = torch.cat(values).mean()
        shared = sorted(text_pairs.keys() & image_pairs.keys())
        if len(shared) > 1:
            images = torch.stack([image_pairs[i] for i in shared])
            texts = torch.stack([text_pairs[i] for i in shared])
            cross.append(contrastive_loss(images, texts, temperature=self.settings.temperature))
            logs["cross/accuracy"] = ((images @ texts.T).argmax(1).cpu() == torch.arange(len(shared))).float().mean()
        if cross:
            part = torch.stack(cross).mean()
            logs["loss/cross"] = part.detach()
            total = total + self.settings.cross * part
        for stream, parts in intrinsic.items():
            part = torch.stack(parts).mean()
            logs[f"loss/intrinsic_{stream}"] = part.detach()
            total = total + self.settings.intrinsic * part
        assert isinstance(total, Tensor), "a step needs at least one batch"
        logs["loss/total"] = total.detach()
        return ObjectiveOutput(total, logs)

    def batch_loss(self, batch: Batch, generator: torch.Generator | None = None) -> tuple[Tensor, TransformerOutput]:
        """Per-sample diffusion loss ``[B]`` of one batch, and the features of each sample's first draw."""
        draws = self._draws(batch)
        target, sources = self._latents(batch)
        prompt = self.text_embedder.embed(batch.prompt_ids, batch.prompt_mask)
        rows = torch.arange(len(batch)).repeat_interleave(draws)
        process: FlowPath | MaskedPath
        if batch.target == "image":
            assert target is not None
            process = self.flow
            path = self.flow.sample_path(target[rows], self.flow.sample_time(len(rows), generator), generator)
            noised: dict[str, Any] = {"latents": path.noised}
        else:
            assert batch.target_ids is not None
            process = self.masked
            time = self.masked.sample_time(len(rows), generator)
            maskable = None if batch.maskable is None else batch.maskable[rows]
            path = self.masked.sample_path(batch.target_ids[rows], time, generator, maskable)
            embeds = self.text_embedder.embed(path.noised, None)
            noised = {"text_embeds": embeds, "logit_positions": path.corrupted}
        output = self._denoise(batch, prompt, sources, noised, path.timestep.to(prompt.device), rows)
        prediction = output.velocity if batch.target == "image" else output.text_logits
        assert prediction is not None
        return process.loss(prediction, path).view(len(batch), draws).mean(1), output

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
        paired = self.settings.cross > 0 and bool((batch.pair_ids >= 0).any())
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
            text_embeds=prompt, text_mask=batch.prompt_mask, images=sources, feature_layer=layer, features=paired
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

    def _latents(self, batch: Batch) -> tuple[Tensor | None, list[Tensor]]:
        """Target (if a picture) and source latents, in one autoencoder pass when sizes agree."""
        images = ([] if batch.target_images is None else [batch.target_images]) + list(batch.sources)
        if not images:
            return None, []
        with torch.no_grad():
            if len({tuple(image.shape) for image in images}) == 1:
                latents = list(self.autoencoder.encode(torch.cat(images)).float().chunk(len(images)))
            else:
                latents = [self.autoencoder.encode(image).float() for image in images]
        return (None, latents) if batch.target_images is None else (latents[0], latents[1:])

    def _collect_pairs(
        self,
        batch: Batch,
        output: TransformerOutput,
        text_pairs: dict[int, Tensor],
        image_pairs: dict[int, Tensor],
        cross: list[Tensor],
    ) -> None:
        rows = (batch.pair_ids >= 0).nonzero().flatten().tolist()
        if not self.settings.cross or not rows:
            return
        if self.settings.cross_form == "published":
            if batch.target == "image" and not batch.sources and len(rows) > 1:
                assert output.image_features is not None
                assert output.text_features is not None
                image = self.transformer.embed(output.image_features, "image")
                text = self.transformer.embed(output.text_features, "text", batch.prompt_mask)
                cross.append(contrastive_loss(image[rows], text[rows], temperature=self.settings.temperature))
            return
        if batch.target == "image" and not batch.sources and output.text_features is not None:
            embedded, pairs = self.transformer.embed(output.text_features, "text", batch.prompt_mask), text_pairs
        elif batch.target == "text" and len(batch.sources) == 1 and output.image_features is not None:
            embedded, pairs = self.transformer.embed(output.image_features, "image"), image_pairs
        else:
            return
        for row in rows:
            pairs[int(batch.pair_ids[row])] = embedded[row]

    def _collect_intrinsic(self, batch: Batch, output: TransformerOutput, intrinsic: dict[str, list[Tensor]]) -> None:
        """Each stream is pulled towards its teacher in the pass in which it is the target."""
        if batch.target == "image" and batch.image_teacher is not None and "image" in self.projectors:
            predicted = self.projectors["image"](output.mid_image_features)
            intrinsic["image"].append(intrinsic_loss(predicted, batch.image_teacher.to(predicted)))
        if batch.target == "text" and batch.text_teacher is not None and "text" in self.projectors:
            predicted = self.projectors["text"](output.mid_text_features)
            intrinsic["text"].append(intrinsic_loss(predicted, batch.text_teacher.to(predicted)))

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
