"""`UniAlignmentTransformer`: denoises target tokens (a picture or a text) given clean condition tokens.

Knows nothing of tasks, diffusion schedules, tokenizers, autoencoders or files: latents and text embeddings come in,
velocities and logits go out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unialignment.errors import ConfigError, InputError
from unialignment.model.blocks import JointBlock, Modulation, Segment, Stream, modulate
from unialignment.model.cache import ConditionCache, TimeModulation, TransformerOutput
from unialignment.model.embeddings import PatchEmbed, TimeEmbedding, unpatchify

Target = Literal["image", "text", "both"]
ATTENTION_MODES = ("joint", "prefix")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


class UniAlignmentTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Dual-stream diffusion transformer for pictures and text.

    Args:
        sample_size: Side of a training picture in latent pixels (scales position coordinates).
        patch_size: Side of a patch in latent pixels.
        in_channels: Latent channels.
        out_channels: Latent channels of the prediction; defaults to ``in_channels``.
        num_layers: Blocks.
        attention_head_dim: Channels a head.
        num_attention_heads: Heads; width = heads x head_dim.
        joint_attention_dim: Width of incoming text embeddings.
        caption_projection_dim: Must equal the width; kept for SD 3 configs.
        pooled_projection_dim: Ignored (the pooled projection is dropped); kept for SD 3 configs.
        pos_embed_max_size: Side of the position table, in patches.
        dual_attention_layers: 0-based blocks with SD 3.5's second attention, among image tokens; needs
            ``modulation="block"``.
        qk_norm: ``None`` or ``"rms_norm"``.
        vocab_size: Text vocabulary.
        num_null_image_tokens: Learned tokens standing for "no picture" when text is modelled alone.
        attention_mode: ``"joint"`` (SD 3 and the published checkpoint) or ``"prefix"`` (cached conditions).
        modulation: ``"block"`` or ``"shared"``, see :class:`~unialignment.model.blocks.JointBlock`.
        mlp_ratio: Feed-forward width as a multiple of the width.
        max_references: Condition pictures that can be told apart (``prefix``).
        prediction: What the image head predicts internally: ``"velocity"`` or ``"sample"`` (x-prediction). ``forward``
            returns a velocity either way.
        activation: ``"gelu"`` or ``"relu2"``, see :class:`~unialignment.model.blocks.FeedForward`.
        aligned_source: A single source picture is also added, projected, to the target's tokens place by place, beside
            being attended to (``prefix`` only): editing and perceiving then start from the identity instead of having
            to learn to look at the same place.
        embedding_dim: Size of the shared space of ``embed_image`` and ``embed_text``; 0: pooled features themselves.

    Raises:
        ConfigError: the sizes contradict each other or an option is unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointBlock"]  # noqa: RUF012 - diffusers' name and form

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int | None = None,
        pooled_projection_dim: int | None = None,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        vocab_size: int = 32128,
        num_null_image_tokens: int = 8,
        attention_mode: str = "joint",
        modulation: str = "block",
        mlp_ratio: float = 4.0,
        max_references: int = 4,
        prediction: str = "velocity",
        activation: str = "gelu",
        aligned_source: bool = False,
        embedding_dim: int = 0,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        for name, value, allowed in (
            ("attention_mode", attention_mode, ATTENTION_MODES),
            ("modulation", modulation, ("block", "shared")),
            ("prediction", prediction, ("velocity", "sample")),
            ("qk_norm", qk_norm, (None, "rms_norm")),
            ("activation", activation, ("gelu", "relu2")),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}.")
        if caption_projection_dim not in (None, dim):
            raise ConfigError(f"caption_projection_dim={caption_projection_dim} must equal heads x head_dim = {dim}.")
        dual_layers = set(dual_attention_layers or ())
        if dual_layers and modulation != "block":
            raise ConfigError("dual_attention_layers (Stable Diffusion 3.5) need modulation='block'.")
        if not dual_layers <= set(range(num_layers)):
            raise ConfigError(f"dual_attention_layers={dual_attention_layers} must be blocks 0 to {num_layers - 1}.")
        out_channels = out_channels or in_channels
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, pos_embed_max_size, max(sample_size // patch_size, 1))
        self.time_text_embed = TimeEmbedding(dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.null_image_embd = nn.Parameter(torch.randn(1, num_null_image_tokens, dim) * 0.02)
        if attention_mode == "prefix":
            self.reference_embed = nn.Embedding(max_references, dim)
            nn.init.normal_(self.reference_embed.weight, std=0.02)
            # Text targets are at time zero like conditions are; this tells a question's words from an answer's.
            self.condition_text_embed = nn.Parameter(torch.zeros(dim))
        if aligned_source:
            if attention_mode != "prefix":
                raise ConfigError("aligned_source needs attention_mode='prefix': 'joint' is the published arithmetic.")
            self.aligned_proj = nn.Linear(in_channels * patch_size * patch_size, dim)
            nn.init.zeros_(self.aligned_proj.weight)
            nn.init.zeros_(self.aligned_proj.bias)
        if modulation == "shared":
            self.shared_modulation, self.shared_modulation_context = Modulation(dim, 6), Modulation(dim, 6)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                *(dim, num_attention_heads, attention_head_dim, mlp_ratio, qk_norm, modulation, activation),
                dual_attention=index in dual_layers,
            )
            for index in range(num_layers)
        )
        self.image_norm_out = Modulation(dim, 2)
        self.image_proj_out = nn.Linear(dim, patch_size * patch_size * out_channels)
        self.text_proj_out = nn.Linear(dim, vocab_size)
        self.image_embedding_head = nn.Linear(dim, embedding_dim) if embedding_dim else None
        self.text_embedding_head = nn.Linear(dim, embedding_dim) if embedding_dim else None
        nn.init.zeros_(self.image_proj_out.weight)
        nn.init.zeros_(self.image_proj_out.bias)
        self.gradient_checkpointing = False
        self.length_bucket = 0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UniAlignmentTransformer:
        """Loads a folder of ours or of the published checkpoint (``SD3JointModelFlexible``: the same names).

        Args:
            pretrained_model_name_or_path: Folder, or hub id (``"owner/name"``), which is downloaded first and then
                checked just like a folder.
            **kwargs: diffusers' (``subfolder``, ``torch_dtype``, ``device_map``, …).

        Raises:
            CheckpointError: there is nothing to load, or it is incomplete, damaged or of another architecture.
        """
        from unialignment.model.folders import fetch_snapshot
        from unialignment.model.published import check_transformer  # it builds transformers itself

        root = Path(pretrained_model_name_or_path)
        if not root.is_dir():
            hub = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
            root = fetch_snapshot(pretrained_model_name_or_path, kwargs.get("subfolder"), **hub)
        # diffusers would fill in what is missing at random, and take defaults from the wrong class.
        kwargs = {**check_transformer(root / (kwargs.get("subfolder") or "")), **kwargs}
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(str(root), **kwargs)

    # ------------------------------------------------------------------ public passes

    def forward(
        self,
        *,
        text_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        sources: list[Tensor] | tuple[Tensor, ...] = (),
        timestep: Tensor | None = None,
        target: Target = "image",
        feature_layer: int | None = None,
        text_mask: Tensor | None = None,
        condition_text_embeds: Tensor | None = None,
        condition_text_mask: Tensor | None = None,
        logit_positions: Tensor | None = None,
        condition_features: bool = True,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Any, ...]:
        """One denoising pass, conditions included (nothing cached).

        Args:
            text_embeds: ``[B, L, D_text]``: the target text when ``target="text"``, else condition text.
            latents: ``[B, C, H, W]``: the noised target picture, or a clean condition picture when ``target="text"``.
            sources: Further clean condition pictures, each ``[B, C, h, w]``.
            timestep: ``[B]``, 0 (clean) to 1000 (noise).
            target: Which head runs; ``"both"`` (``joint`` only) runs both.
            feature_layer: 1-based block whose hidden states to return.
            text_mask: Bool ``[B, L]``, ``True`` for real tokens. ``None``: all, as SD 3 does.
            condition_text_embeds: ``[B, Lc, D_text]`` text given while ``text_embeds`` is denoised (a question).
            condition_text_mask: Bool ``[B, Lc]``.
            logit_positions: Bool ``[B, L]``: compute text logits there only.
            condition_features: In ``prefix`` mode, also finish the last block for conditions so that their final
                features are returned; ``False`` saves that work.
            return_dict: ``False`` returns a tuple of the entries that aren't ``None``.

        Raises:
            InputError: the target's tokens or the timestep are missing, or ``target="both"`` in ``prefix`` mode.
        """
        timestep = self._check(target, latents, text_embeds, timestep)
        if self.config.attention_mode == "joint":
            output = self._joint(
                latents, list(sources), text_embeds, condition_text_embeds, timestep, target, feature_layer,
                text_mask, condition_text_mask, logit_positions,
            )  # fmt: skip
        else:
            image_target = target == "image"
            cache = self.prefill(
                text_embeds=text_embeds if image_target else condition_text_embeds,
                text_mask=text_mask if image_target else condition_text_mask,
                images=list(sources) if image_target else ([] if latents is None else [latents]) + list(sources),
                feature_layer=feature_layer,
                features=condition_features,
            )
            output = self.denoise(
                cache,
                latents=latents if image_target else None,
                text_embeds=None if image_target else text_embeds,
                text_mask=None if image_target else text_mask,
                timestep=timestep,
                feature_layer=feature_layer,
                logit_positions=logit_positions,
            )
            # The features of the stream that is only a condition come from the prefill.
            if image_target:
                output.text_features = cache.output.text_features
                output.mid_text_features = cache.output.mid_text_features
            else:
                output.image_features = cache.output.image_features
                output.mid_image_features = cache.output.mid_image_features
        return output if return_dict else output.to_tuple()

    def prefill(
        self,
        *,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        images: list[Tensor] | tuple[Tensor, ...] = (),
        feature_layer: int | None = None,
        features: bool = False,
    ) -> ConditionCache:
        """Encodes clean conditions once; they see only each other and are modulated at time zero (``prefix`` mode).

        Args:
            text_embeds: ``[B, L, D_text]`` condition text.
            text_mask: Bool ``[B, L]``; at least one real token a row.
            images: Clean pictures, each ``[B, C, h, w]``; picture i carries reference embedding i.
            feature_layer: 1-based block whose hidden states to keep.
            features: Also finish the last block, so that final features are available in ``cache.output``
                (image features are those of the first picture).

        Raises:
            InputError: ``joint`` mode has no cache, or there are more pictures than the model can tell apart.
        """
        if self.config.attention_mode != "prefix":
            raise InputError("prefill needs attention_mode='prefix': in 'joint' mode conditions change at every step.")
        if len(images) > self.config.max_references:
            raise InputError(
                f"{len(images)} condition pictures given, the model tells {self.config.max_references} apart."
            )
        parameter = self.context_embedder.weight
        zero = torch.zeros(1, device=parameter.device)
        segments: list[Segment] = []
        for index, image in enumerate(images):
            tokens = self.pos_embed(image) + self.reference_embed.weight[index]
            segments.append(self._segment("image", tokens, zero))
        if text_embeds is not None and text_embeds.shape[1]:
            tokens = self.context_embedder(text_embeds) + self.condition_text_embed
            segments.append(self._segment("text", tokens, zero))
        else:
            text_mask = None
        if not segments:
            raise InputError("no condition given: pass text_embeds (an empty prompt has one end token) or images.")
        batch = segments[0].tokens.shape[0]
        mask = self._key_mask(batch, [(s.tokens.shape[1], text_mask if s.stream == "text" else None) for s in segments])
        keys, values, middle, last = [], [], segments, len(self.transformer_blocks) - 1
        for index, block in enumerate(self.transformer_blocks):
            finish = features or index < last
            segments, (key, value) = self._run(block, segments, None, mask, finish)
            keys.append(key)
            values.append(value)
            if feature_layer == index + 1:
                middle = segments
        output = TransformerOutput()
        if feature_layer is not None:
            output.mid_image_features, output.mid_text_features = _first(middle, "image"), _first(middle, "text")
        if features:
            output.image_features, output.text_features = (
                self._final(segments, "image"),
                self._final(segments, "text"),
            )
        aligned = None
        if self.config.aligned_source and len(images) == 1:
            aligned = self.aligned_proj(self.pos_embed.patches(images[0]))
        return ConditionCache(tuple(keys), tuple(values), mask, output, aligned)

    def denoise(
        self,
        cache: ConditionCache,
        *,
        latents: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        timestep: Tensor,
        feature_layer: int | None = None,
        logit_positions: Tensor | None = None,
        modulation: TimeModulation | None = None,
    ) -> TransformerOutput:
        """One pass over the target tokens alone, against cached conditions (``prefix`` mode).

        Args:
            cache: From :meth:`prefill`, of the same batch size.
            latents: ``[B, C, H, W]`` noised target picture; or
            text_embeds: ``[B, L, D_text]`` target text.
            text_mask: Bool ``[B, L]``, ``True`` for real positions of the target text.
            timestep: ``[B]``, or ``[1]``: the same for all, which saves work.
            feature_layer: 1-based block whose hidden states to return.
            logit_positions: Bool ``[B, L]``: compute text logits there only.
            modulation: What :meth:`time_modulation` gave for this stream and timestep.
        """
        stream: Stream
        if latents is not None:
            stream, tokens = "image", self.pos_embed(latents)
            # A source of another size has no same places.
            if cache.aligned is not None and cache.aligned.shape[1] == tokens.shape[1]:
                tokens = tokens + cache.aligned
        elif text_embeds is not None:
            stream, tokens = "text", self.context_embedder(text_embeds)
        else:
            raise InputError("denoise needs a target: pass latents or text_embeds.")
        segment = self._segment(stream, tokens, timestep, modulation)
        mask = self._key_mask(tokens.shape[0], [(cache.length, cache.mask), (tokens.shape[1], text_mask)])
        segments, middle = [segment], None
        fits = cache.room is not None and cache.room[0][0].shape[2] >= cache.length + tokens.shape[1]
        rooms = cache.room if fits and not torch.is_grad_enabled() else None
        for index, block in enumerate(self.transformer_blocks):
            if modulation is not None:
                segments[0].ready = modulation.blocks[index]
            cached = cache.keys[index], cache.values[index]
            segments, _ = self._run(block, segments, cached, mask, True, None if rooms is None else rooms[index])
            if feature_layer == index + 1:
                middle = segments[0].tokens
        output = TransformerOutput()
        self._heads(output, segments, latents, timestep, image=stream == "image", text=stream == "text",
                    logit_positions=logit_positions)  # fmt: skip
        if stream == "image":
            output.mid_image_features = middle
        else:
            output.mid_text_features = middle
        return output

    def time_modulation(self, stream: Stream, timestep: Tensor) -> TimeModulation | None:
        """The time's share of every block, ahead of the steps that need it.

        It depends on nothing else, and reading its weights (a quarter of a block's, in SD 3's form) at every step costs
        much of a step over few tokens. ``None`` where weights aren't all at hand (offloaded ones).

        Args:
            stream: ``"image"`` or ``"text"``.
            timestep: ``[S]``, 0 to 1000.
        """
        home = self.context_embedder.weight.device
        if home.type == "meta" or any(p.device != home for p in self.transformer_blocks.parameters()):
            return None
        segment = self._segment(stream, self.context_embedder.weight[:0, None], timestep)
        blocks = tuple(
            block.modulation(stream, segment.embedding, segment.shared)  # type: ignore[operator]
            for block in self.transformer_blocks
        )
        return TimeModulation(timestep, segment.embedding, blocks)

    def fuse_projections(self) -> None:
        """Lays query, key and value weights side by side in memory, so that passes without gradients needn't copy them.

        Values, names and memory stay; it is repeated at no cost, and undone by whatever moves or replaces weights.
        """
        for block in self.transformer_blocks:
            block.attn.fuse()  # type: ignore[operator, union-attr]

    def compile_for_inference(self, bucket: int = 32, **options: Any) -> None:
        """Compiles the blocks with ``torch.compile``: one code for all of them, one compilation a shape.

        Prompts are padded to a multiple of ``bucket`` tokens from here on (masked: results stay the same), so that
        their lengths don't ask for compilations of their own. PyTorch keeps compiled code on disk between processes
        (``TORCHINDUCTOR_CACHE_DIR``). Compiled code can't notice weights that were replaced (rather than written to):
        call :meth:`fuse_projections` after that, as the pipeline does before every batch.

        Args:
            bucket: Tokens.
            **options: ``torch.compile``'s.
        """
        # One code serves all blocks, for every combination of prefill, pictures, texts and their shapes.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.fuse_projections()
        self.length_bucket = bucket
        for block in self.transformer_blocks:
            block.compile(**{"dynamic": False, **options})

    def embed(self, features: Tensor, stream: Stream, mask: Tensor | None = None) -> Tensor:
        """Mean-pools final features ``[B, N, D]`` over real tokens and maps them to unit vectors ``[B, E]``."""
        if mask is None:
            pooled = features.mean(1)
        else:
            weights = mask.to(features.dtype).unsqueeze(-1)
            pooled = (features * weights).sum(1) / weights.sum(1).clamp_min(1)
        head = self.image_embedding_head if stream == "image" else self.text_embedding_head
        return F.normalize((pooled if head is None else head(pooled)).float(), dim=-1)

    # ------------------------------------------------------------------ internals

    def _check(self, target: str, latents: Tensor | None, text: Tensor | None, timestep: Tensor | None) -> Tensor:
        if target not in ("image", "text", "both"):
            raise InputError(f"target={target!r} is unknown: use 'image', 'text' or 'both'.")
        if target == "both" and self.config.attention_mode == "prefix":
            raise InputError("target='both' needs attention_mode='joint': in 'prefix' mode one side is the condition.")
        if target in ("image", "both") and latents is None:
            raise InputError(f"target={target!r} needs latents.")
        if target in ("text", "both") and text is None:
            raise InputError(f"target={target!r} needs text_embeds.")
        if timestep is None:
            raise InputError("timestep is missing: pass [B], 0 (clean) to 1000 (noise).")
        return timestep

    def _segment(
        self, stream: Stream, tokens: Tensor, timestep: Tensor, modulation: TimeModulation | None = None
    ) -> Segment:
        if modulation is not None:
            return Segment(stream, tokens.to(self.context_embedder.weight.dtype), modulation.embedding)
        embedding = self.time_text_embed(timestep)
        shared = None
        if self.config.modulation == "shared":
            maps = self.shared_modulation if stream == "image" else self.shared_modulation_context
            shared = maps(embedding)
        # Under autocast projections are bfloat16; the residual stream stays in the type of the weights.
        return Segment(stream, tokens.to(self.context_embedder.weight.dtype), embedding, shared)

    @staticmethod
    def _key_mask(batch: int, parts: list[tuple[int, Tensor | None]]) -> Tensor | None:
        """Bool ``[B, sum of lengths]`` from per-part masks, ``None`` when every key is visible."""
        given = [mask for _, mask in parts if mask is not None]
        if not given:
            return None
        device = given[0].device
        return torch.cat(
            [m if m is not None else torch.ones(batch, n, dtype=torch.bool, device=device) for n, m in parts], dim=1
        )

    def _run(
        self,
        block: nn.Module,
        segments: list[Segment],
        cached: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        finish: bool,
        room: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[list[Segment], tuple[Tensor, Tensor]]:
        keys = None if mask is None else mask[:, None, None, :]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, segments, cached=cached, mask=keys, finish=finish, use_reentrant=False)
        return block(segments, cached=cached, mask=keys, finish=finish, room=room)

    def _final(self, segments: list[Segment], stream: Stream) -> Tensor | None:
        segment = next((s for s in segments if s.stream == stream), None)
        if segment is None:
            return None
        tokens = F.layer_norm(segment.tokens, segment.tokens.shape[-1:], eps=1e-6)
        if stream == "text":
            # The published text stream ends in a plain norm; only the image stream's is modulated by time.
            return tokens
        scale, shift = self.image_norm_out(segment.embedding).unsqueeze(1).chunk(2, dim=-1)
        return modulate(tokens, shift, scale)

    def _heads(
        self,
        output: TransformerOutput,
        segments: list[Segment],
        latents: Tensor | None,
        timestep: Tensor,
        *,
        image: bool,
        text: bool,
        logit_positions: Tensor | None,
    ) -> None:
        output.image_features, output.text_features = self._final(segments, "image"), self._final(segments, "text")
        if image and latents is not None and output.image_features is not None:
            tokens = self.image_proj_out(output.image_features)
            prediction = unpatchify(tokens, latents.shape[-2], latents.shape[-1], self.config.patch_size)
            if self.config.prediction == "sample":
                sigma = (timestep.float() / 1000).clamp_min(1e-3).view(-1, 1, 1, 1)
                prediction = (latents.float() - prediction.float()) / sigma
            output.velocity = prediction
        if text and output.text_features is not None:
            features = output.text_features if logit_positions is None else output.text_features[logit_positions]
            output.text_logits = self.text_proj_out(features)

    def _joint(
        self,
        latents: Tensor | None,
        sources: list[Tensor],
        text_embeds: Tensor | None,
        condition_text_embeds: Tensor | None,
        timestep: Tensor,
        target: Target,
        feature_layer: int | None,
        text_mask: Tensor | None,
        condition_text_mask: Tensor | None,
        logit_positions: Tensor | None,
    ) -> TransformerOutput:
        """The published arithmetic: all tokens see all tokens, all share the target's time and positions."""
        segments: list[Segment] = []
        parts: list[tuple[int, Tensor | None]] = []
        for image in ([] if latents is None else [latents]) + sources:
            segments.append(self._segment("image", self.pos_embed(image), timestep))
            parts.append((segments[-1].tokens.shape[1], None))
        if not segments:
            if text_embeds is None:
                raise InputError("nothing to attend to: pass latents, sources or text_embeds.")
            null = self.null_image_embd.expand(text_embeds.shape[0], -1, -1)
            segments.append(self._segment("image", null, timestep))
            parts.append((null.shape[1], None))
        for text, mask in ((text_embeds, text_mask), (condition_text_embeds, condition_text_mask)):
            if text is not None and text.shape[1]:
                segments.append(self._segment("text", self.context_embedder(text), timestep))
                parts.append((text.shape[1], mask))
        mask = self._key_mask(segments[0].tokens.shape[0], parts)
        middle = segments
        for index, block in enumerate(self.transformer_blocks):
            segments, _ = self._run(block, segments, None, mask, True)
            if feature_layer == index + 1:
                middle = segments
        output = TransformerOutput()
        self._heads(output, segments, latents, timestep, image=target in ("image", "both"),
                    text=target in ("text", "both"), logit_positions=logit_positions)  # fmt: skip
        if latents is None:
            output.image_features = None
        if feature_layer is not None:
            output.mid_image_features = None if latents is None else _first(middle, "image")
            output.mid_text_features = _first(middle, "text")
        return output


def _first(segments: list[Segment], stream: Stream) -> Tensor | None:
    return next((segment.tokens for segment in segments if segment.stream == stream), None)
