"""Predicts the memory of training and of inference from a configuration's sizes alone, and what makes it fit.

The model is built from fake tensors, which have shapes and types but no storage, and one real training step and one
real denoising step are run on them while live bytes are counted. So what is predicted is what the code does, not what a
formula says. Not counted: scratch memory inside operators, the allocator's reserve and fragmentation, and the CUDA
context; leave some room. Attention is counted as computed by fused kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unialignment.errors import ConfigError
from unialignment.memory import MemoryTracker, size_of, tensors_of
from unialignment.model.checkpoints import read_json
from unialignment.model.streaming import format_size
from unialignment.model.text import TokenEmbedder
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.tasks import TASKS
from unialignment.training import lora
from unialignment.training.batching import PROMPT_BUCKET
from unialignment.training.build import transformer_arguments
from unialignment.training.config import TransformerConfig

T5_PROMPT, WORLD_PROMPT = 256, 24
"""Condition tokens of a text: with T5, as published; in the scene world's language, about the longest."""
T5_XXL: dict[str, Any] = {
    **{"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu"},
}
SD3_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    **{"layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32, "sample_size": 1024},
    **{"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
}
_PAIRED = ("generate", "caption", "infill")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step.

    Attributes:
        parameters: Numbers in the transformer (not bytes).
        trainable: Numbers that are trained, text embedder included (not bytes).
        weights: All components' weights.
        gradients: Of the trained weights.
        optimizer: Its state.
        average: The average of the trained weights (EMA).
        activations: What the step's peak has above weights, gradients at that moment included, less ``gradients``.
        peak: All of it at its highest.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    peak: int


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of drawing one picture from a prompt and a source picture, with guidance.

    Attributes:
        weights: By component.
        working: Most that each stage needs above weights: ``text``, ``encode``, ``denoise``, ``decode``.
        peak: Everything resident.
        without_text_encoder: The text encoder dropped once prompts are encoded, before the others are loaded.
        offloaded: Only the component at work resident.
    """

    weights: dict[str, int]
    working: dict[str, int]
    peak: int
    without_text_encoder: int
    offloaded: int


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Attributes:
        training: As configured.
        inference: By dtype.
        budget: Bytes to fit into, if given.
        fitting: Overrides that make training fit the budget; empty when it fits as it is, ``None`` when nothing does.
        fitted: Training with them.
        fitting_inference: The first inference setting that fits, in words; ``None``: none does.
        notes: What was assumed.
    """

    training: TrainingMemory
    inference: dict[str, InferenceMemory]
    budget: int | None = None
    fitting: tuple[str, ...] | None = None
    fitted: TrainingMemory | None = None
    fitting_inference: str | None = None
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        from dataclasses import asdict

        return asdict(self)

    def lines(self) -> list[str]:
        """A text for people."""
        text = [
            f"transformer: {self.training.parameters / 1e6:,.1f} M parameters, {self.training.trainable / 1e6:,.1f} M "
            "trained (text embedder included)",
            "training, as configured:",
            *_training_lines(self.training),
        ]
        for dtype, memory in self.inference.items():
            weights = ", ".join(f"{name} {format_size(size)}" for name, size in memory.weights.items())
            text += [
                f"inference in {dtype} (one picture edited, with guidance): peak {format_size(memory.peak)}",
                f"  weights: {weights}",
                f"  text encoder released after the prompt: {format_size(memory.without_text_encoder)}; "
                f"one component at a time: {format_size(memory.offloaded)}",
            ]
        if self.budget is not None:
            text.append(f"to fit into {format_size(self.budget)}:")
            if self.fitting is None or self.fitted is None:
                text.append("  training: no combination of switches fits; use more memory or a smaller model")
            elif not self.fitting:
                text.append("  training: fits as configured")
            else:
                text.append(f"  training: {' '.join(self.fitting)}")
                text += _training_lines(self.fitted, "    ")
            text.append(f"  inference: {self.fitting_inference or 'nothing here fits'}")
        return [*text, *(f"note: {note}" for note in self.notes)]


def _training_lines(memory: TrainingMemory, indent: str = "  ") -> list[str]:
    parts = ("weights", "gradients", "optimizer", "average", "activations", "peak")
    return [f"{indent}{part:<12}{format_size(getattr(memory, part)):>12}" for part in parts]


# ------------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class _Components:
    """A run's modules, of fake tensors."""

    transformer: UniAlignmentTransformer
    embedder: TokenEmbedder | None
    encoder: nn.Module | None
    autoencoder: Any
    side: int  # latent positions along one side

    @property
    def modules(self) -> list[nn.Module]:
        """Those that there are."""
        found = (self.transformer, self.embedder, self.encoder, self.autoencoder)
        return [module for module in found if module is not None]


@contextlib.contextmanager
def _fake() -> Iterator[None]:
    # Random numbers that don't exist must not move the caller's generator.
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        yield


def _materialise(parts: _Components) -> None:
    """Fake tensors in place of meta ones, which kernels that differ by device would treat differently."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in parts.modules:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if parameter not in made:
                        fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                        made[parameter] = nn.Parameter(fake, parameter.requires_grad)
                    part._parameters[name] = made[parameter]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _autoencoder(config: TransformerConfig, published: bool, notes: list[str]) -> Any:
    from unialignment.model.autoencoder import build_autoencoder

    folders = [config.autoencoder.path]
    if config.model.initial is not None:
        folders += [config.model.initial / "autoencoder", config.model.initial / "vae"]
    for folder in folders:
        if folder is not None and (folder / "config.json").is_file():
            settings = read_json(folder / "config.json")
            name = settings.get("_class_name", "AutoencoderKL")
            return build_autoencoder(name, **{k: v for k, v in settings.items() if not k.startswith("_")})
    if published:
        notes.append("the autoencoder's folder isn't there: Stable Diffusion 3's was assumed")
        return build_autoencoder("AutoencoderKL", **SD3_VAE)
    if config.autoencoder.path is not None:
        notes.append(f"no folder {config.autoencoder.path}: the scene world's autoencoder was assumed")
        return build_autoencoder("WorldAutoencoder")
    return build_autoencoder("PixelAutoencoder")


def _text_encoder(config: TransformerConfig, published: bool, notes: list[str]) -> nn.Module | None:
    from transformers import T5Config, T5EncoderModel

    initial = config.model.initial
    for name in ("text_embedder", "text_encoder"):
        path = None if initial is None else initial / name / "config.json"
        if path is not None and path.is_file():
            settings = read_json(path)
            if "d_model" not in settings:
                return None
            return T5EncoderModel(T5Config(**settings))
    if not published:
        return None
    notes.append("the text encoder's folder isn't there: T5-XXL (4.8 B parameters) was assumed")
    return T5EncoderModel(T5Config(**T5_XXL))


def _vocabulary(config: TransformerConfig) -> int:
    folder = config.text.tokenizer
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        return int(read_json(folder / "tokenizer_config.json").get("vocab_size", config.text.vocab_size))
    return config.text.vocab_size


def _initial_settings(config: TransformerConfig) -> dict[str, Any] | None:
    folder = None if config.model.initial is None else config.model.initial / "transformer"
    if folder is None or not (folder / "config.json").is_file():
        return None
    from unialignment.model.published import transformer_settings

    return transformer_settings(folder)


def _build(config: TransformerConfig, notes: list[str]) -> _Components:
    with torch.device("meta"):
        return _build_on_meta(config, notes)


def _build_on_meta(config: TransformerConfig, notes: list[str]) -> _Components:
    published = config.model.flavour == "sd3-medium"
    autoencoder = _autoencoder(config, published, notes).eval().requires_grad_(False)
    encoder = _text_encoder(config, published, notes)
    arguments = _initial_settings(config)
    if arguments is None:
        resolution = int(config.model.transformer.get("sample_size", 0)) * autoencoder.spatial_factor
        resolution = resolution or {"nano": 64}.get(config.world.preset, 128)
        side = resolution // autoencoder.spatial_factor
        vocabulary = 32128 if encoder is not None else _vocabulary(config)
        arguments = transformer_arguments(config, side, autoencoder.latent_channels, vocabulary)
        if encoder is not None:
            arguments["joint_attention_dim"] = int(cast("Any", encoder).config.d_model)
    transformer = UniAlignmentTransformer(**arguments)
    embedder = None
    if encoder is None:
        embedder = TokenEmbedder(
            transformer.config.vocab_size, transformer.config.joint_attention_dim, config.text.max_length
        )
    else:
        encoder.requires_grad_(False)
        if config.lora.rank and config.lora.base_precision == "bf16":
            nn.Module.to(encoder, torch.bfloat16)
    transformer.gradient_checkpointing = config.run.activation_checkpointing
    if config.lora.rank:
        lora.prepare(transformer, embedder or nn.Module(), config.lora)
    return _Components(transformer, embedder, encoder, autoencoder, int(transformer.config.sample_size))


# ------------------------------------------------------------------------------------------------------------- training


def _groups(config: TransformerConfig) -> list[tuple[str, int, int, int, bool]]:
    """(target, sources, text length, samples, paired) of each batch of a micro-batch, in the objective's order."""
    groups: dict[tuple[str, int, int], list[Any]] = {}
    for name, count in config.mixture.items():
        task = TASKS.get(name)
        # Compositions of two and of three pictures are equally frequent in the scene world.
        shares = {2: count - count // 2, 3: count // 2} if task.max_sources > 1 else {task.max_sources: count}
        for sources, share in shares.items():
            if share:
                entry = groups.setdefault((task.target, sources, task.target_length), [0, False])
                entry[0] += share
                entry[1] = entry[1] or name in _PAIRED
    return [(*key, count, paired and config.loss.cross > 0) for key, (count, paired) in sorted(groups.items())]


def _prompt_tokens(parts: _Components, given: int | None) -> int:
    return given or (WORLD_PROMPT if parts.encoder is None else T5_PROMPT)


def _embed(parts: _Components, batch: int, length: int) -> Tensor:
    if parts.embedder is not None:
        return parts.embedder.embed(torch.zeros(batch, length, dtype=torch.long))
    assert parts.encoder is not None
    width = parts.transformer.config.joint_attention_dim
    with torch.no_grad():
        dtype = next(parts.encoder.parameters()).dtype
        return parts.encoder(inputs_embeds=torch.empty(batch, length, width, dtype=dtype)).last_hidden_state


def _step(config: TransformerConfig, parts: _Components, prompt: int) -> None:
    """One micro-batch, forward and backward, as the objective computes it."""
    losses: list[Tensor] = []
    pixels = parts.side * parts.autoencoder.spatial_factor
    layer = config.loss.feature_layer if config.teacher.name is not None else None
    with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16"):
        for target, sources, length, batch, paired in _groups(config):
            count = sources + (target == "image")
            images = torch.empty(batch * count, 3, pixels, pixels)
            with torch.no_grad():
                latents = list(parts.autoencoder.encode(images).float().chunk(count)) if count else []
            # Captions have no prompt, questions are short.
            words = prompt if target == "image" or parts.encoder is not None else min(prompt, PROMPT_BUCKET)
            text, mask = _embed(parts, batch, words), torch.ones(batch, words, dtype=torch.bool)
            if target == "image":
                loss = _image_loss(config, parts, latents, text, mask, paired, layer)
            else:
                loss = _text_loss(parts, latents, text, mask, batch, length, paired, layer)
            losses.append(loss)
    torch.stack(losses).sum().backward()


def _image_loss(
    config: TransformerConfig,
    parts: _Components,
    latents: list[Tensor],
    text: Tensor,
    mask: Tensor,
    paired: bool,
    layer: int | None,
) -> Tensor:
    clean, draws = latents[0], config.loss.draws
    if draws > 1:
        cache = parts.transformer.prefill(
            text_embeds=text, text_mask=mask, images=latents[1:], feature_layer=layer, features=paired
        )
        rows = torch.zeros(len(clean) * draws, dtype=torch.long)
        clean = clean[rows]
        noise = torch.randn_like(clean)
        output = parts.transformer.denoise(
            cache.select(rows),
            latents=torch.lerp(clean, noise, 0.5),
            timestep=torch.empty(len(clean)),
            feature_layer=layer,
        )
    else:
        noise = torch.randn_like(clean)
        output = parts.transformer(
            text_embeds=text,
            text_mask=mask,
            latents=torch.lerp(clean, noise, 0.5),
            sources=latents[1:],
            timestep=torch.empty(len(clean)),
            feature_layer=layer,
            condition_features=paired,
        )
    velocity = cast(Tensor, output.velocity)
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1).sum()


def _text_loss(
    parts: _Components,
    latents: list[Tensor],
    prompt: Tensor,
    mask: Tensor,
    batch: int,
    length: int,
    paired: bool,
    layer: int | None,
) -> Tensor:
    # Half of the positions are masked on average. Which ones doesn't matter to memory, but their number must be known.
    masked = torch.zeros(max(1, batch * length // 2), dtype=torch.long)
    output = parts.transformer(
        text_embeds=_embed(parts, batch, length),
        latents=latents[0] if latents else None,
        sources=latents[1:],
        timestep=torch.empty(batch),
        target="text",
        feature_layer=layer,
        condition_text_embeds=prompt,
        condition_text_mask=mask,
        logit_positions=(masked, masked),
        condition_features=paired,
    )
    logits = output.text_logits.float().clone()
    return F.cross_entropy(logits, masked, reduction="none").sum()


def _optimizer_bytes(config: TransformerConfig, parts: _Components) -> int:
    modules = [module for module in (parts.transformer, parts.embedder) if module is not None]
    trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    if config.optimizer.name == "adamw8bit":
        return sum(2 * p.numel() for _, p in trained)
    if config.optimizer.name == "adamw":
        return sum(8 * p.numel() for _, p in trained)
    matrices = [p.ndim == 2 and "blocks." in name and "norm" not in name for name, p in trained]
    return sum((4 if matrix else 8) * p.numel() for matrix, (_, p) in zip(matrices, trained, strict=True))


def _resident(config: TransformerConfig, parts: _Components) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, average and optimizer state."""
    trained = [p for module in parts.modules for p in module.parameters() if p.requires_grad]
    weights = size_of(tensors_of(*parts.modules))
    return weights, size_of(trained), sum(4 * p.numel() for p in trained), _optimizer_bytes(config, parts)


def _shorten(parts: _Components) -> None:
    """A frozen encoder's working memory doesn't grow with its depth: two blocks tell as much as all."""
    stack = getattr(parts.encoder, "encoder", None)
    if stack is not None:
        stack.block = stack.block[:2]


def training_memory(
    config: TransformerConfig, prompt_tokens: int | None = None, notes: list[str] | None = None
) -> TrainingMemory:
    """Predict the memory of one training step.

    Args:
        config: A transformer run.
        prompt_tokens: Condition tokens of a text; 256 with T5, 24 for the scene world unless given.
        notes: Receives what was assumed.

    Raises:
        ConfigError: The configuration contradicts itself.
        CheckpointError: A folder that it names is damaged.
    """
    parts = _build(config, notes if notes is not None else [])
    with _fake():
        _materialise(parts)
        modules = parts.modules
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        weights, gradients, average, optimizer = _resident(config, parts)
        _shorten(parts)
        if config.micro_batches > 1:  # those of the first micro-batch are there during the second
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        before = gradients if config.micro_batches > 1 else 0
        existing = [*tensors_of(*modules), *(p.grad for p in trained if p.grad is not None)]
        parts.transformer.train()
        with MemoryTracker(existing) as tracker:
            _step(config, parts, _prompt_tokens(parts, prompt_tokens))
        step = max(tracker.peak + before, gradients)
        return TrainingMemory(
            parameters=sum(p.numel() for n, p in parts.transformer.named_parameters() if "lora_" not in n),
            trainable=sum(p.numel() for p in trained),
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            average=average,
            activations=step - gradients,
            peak=weights + optimizer + average + step,
        )


# ------------------------------------------------------------------------------------------------------------ inference


@torch.no_grad()
def inference_memory(
    config: TransformerConfig, dtype: torch.dtype, prompt_tokens: int | None = None
) -> InferenceMemory:
    """Predict the memory of editing one picture, with guidance on the text.

    Args:
        config: A transformer run; its model is meant.
        dtype: Of transformer and text embedder; the autoencoder stays in float32.
        prompt_tokens: Condition tokens.
    """
    plain = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 0})})
    parts = _build(plain, [])
    text_module: nn.Module = parts.embedder or parts.encoder  # type: ignore[assignment]
    for part in (parts.transformer, text_module):
        nn.Module.to(part, dtype)
    with _fake():
        _materialise(parts)
        parts.transformer.eval()
        length, pixels = _prompt_tokens(parts, prompt_tokens), parts.side * parts.autoencoder.spatial_factor
        channels, width = parts.autoencoder.latent_channels, parts.transformer.config.joint_attention_dim
        latents = torch.empty(2, channels, parts.side, parts.side, dtype=dtype)
        text, time = torch.empty(2, length, width, dtype=dtype), torch.empty(2)
        mask = torch.ones(2, length, dtype=torch.bool)

        def denoise() -> Any:
            if parts.transformer.config.attention_mode == "joint":
                # Branch by branch, as the denoiser does.
                return parts.transformer(
                    text_embeds=text[:1],
                    text_mask=mask[:1],
                    latents=latents[:1],
                    sources=[latents[:1]],
                    timestep=time[:1],
                )
            cache = parts.transformer.prefill(text_embeds=text, text_mask=mask, images=[latents])
            return parts.transformer.denoise(cache, latents=latents, timestep=time)

        stages = {
            "text": (text_module, lambda: _embed(parts, 2, length)),
            "encode": (parts.autoencoder, lambda: parts.autoencoder.encode(torch.empty(1, 3, pixels, pixels))),
            "denoise": (parts.transformer, denoise),
            "decode": (parts.autoencoder, lambda: parts.autoencoder.decode(torch.empty(1, *latents.shape[1:]))),
        }
        weights = {
            "transformer": size_of(tensors_of(parts.transformer)),
            "text_embedder": size_of(tensors_of(text_module)),
            "autoencoder": size_of(tensors_of(parts.autoencoder)),
        }
        _shorten(parts)
        working = {}
        for name, (module, run) in stages.items():
            with MemoryTracker([*tensors_of(module), latents, text, mask, time]) as tracker:
                run()
            working[name] = tracker.peak
    rest = weights["transformer"] + weights["autoencoder"]
    later = max(working[name] for name in ("encode", "denoise", "decode"))
    return InferenceMemory(
        weights=weights,
        working=working,
        peak=sum(weights.values()) + max(working.values()),
        without_text_encoder=max(weights["text_embedder"] + working["text"], rest + later),
        offloaded=max(
            weights["text_embedder"] + working["text"],
            weights["transformer"] + working["denoise"],
            weights["autoencoder"] + max(working["encode"], working["decode"]),
        ),
    )


# -------------------------------------------------------------------------------------------------------------- fitting


def _apply(config: TransformerConfig, override: str) -> TransformerConfig:
    section, _, rest = override.partition("=")
    value: Any = {"true": True}.get(rest, int(rest) if rest.isdigit() else rest)
    room, _, key = section.partition(".")
    if not key:
        return config.model_copy(update={room: value})
    return config.model_copy(update={room: getattr(config, room).model_copy(update={key: value})})


def _halved(config: TransformerConfig, times: int) -> TransformerConfig:
    """The same batch in ``2 ** times`` as many micro-batches, as near as whole samples allow."""
    factor = 2**times
    mixture = {task: -(-count // factor) for task, count in config.mixture.items()}
    return config.model_copy(update={"mixture": mixture, "micro_batches": config.micro_batches * factor})


def _said(config: TransformerConfig) -> str:
    mixture = ", ".join(f"{task}: {count}" for task, count in config.mixture.items())
    return f"micro_batches={config.micro_batches} 'mixture={{{mixture}}}'"


def _fit(
    config: TransformerConfig, budget: int, first: TrainingMemory, prompt_tokens: int | None
) -> tuple[tuple[str, ...] | None, TrainingMemory | None]:
    """The mildest switches that make training fit, each kept once it has been tried."""
    if first.peak <= budget:
        return (), first
    chosen: list[str] = []
    ladder: list[list[str]] = [[]]
    if config.run.precision != "bf16":
        ladder.append(["run.precision=bf16"])
    if not config.run.activation_checkpointing:
        ladder.append(["run.activation_checkpointing=true"])
    if config.optimizer.name == "adamw":
        ladder.append(["optimizer.name=adamw8bit"])
    if not config.lora.rank:
        ladder.append(["optimizer.name=adamw", "lora.rank=16", "lora.base_precision=bf16"])
    elif config.lora.base_precision != "bf16":
        ladder.append(["lora.base_precision=bf16"])
    deepest = max(0, (max(config.mixture.values()) - 1).bit_length())
    for step in ladder:
        for override in step:
            config = _apply(config, override)
            chosen = [item for item in chosen if item.partition("=")[0] != override.partition("=")[0]] + [override]
        if sum(_resident(config, _build(config, []))) > budget:
            continue  # without any activation
        smallest = _halved(config, deepest)
        least = training_memory(smallest, prompt_tokens)
        if least.peak > budget:
            continue
        for times in range(deepest + 1):
            tried = _halved(config, times)
            # Activations grow linearly with the samples: skip what clearly can't fit.
            ratio = sum(tried.mixture.values()) / sum(smallest.mixture.values())
            if times < deepest and least.peak + least.activations * (ratio - 1) * 0.5 > budget:
                continue
            memory = least if times == deepest else training_memory(tried, prompt_tokens)
            if memory.peak <= budget:
                return (*chosen, *([_said(tried)] if times else [])), memory
    return None, None


def plan(config: Any, budget: int | None = None, prompt_tokens: int | None = None) -> Plan:
    """Predict the memory of a configuration, and find switches that make it fit.

    Args:
        config: A transformer run.
        budget: Bytes to fit into.
        prompt_tokens: Condition tokens of a text.

    Raises:
        ConfigError: It is the configuration of another kind of run, or contradicts itself.
    """
    if not isinstance(config, TransformerConfig):
        raise ConfigError("plan needs a configuration of kind: transformer; autoencoders here are small")
    notes: list[str] = []
    training = training_memory(config, prompt_tokens, notes)
    notes.append("an accelerator also holds its context and unused reserve: leave about a gigabyte of room")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    inference = {name: inference_memory(config, dtype, prompt_tokens) for name, dtype in dtypes.items()}
    result = Plan(training, inference, budget, notes=tuple(dict.fromkeys(notes)))
    if budget is None:
        return result
    fitting, fitted = _fit(config, budget, training, prompt_tokens)
    if fitting and any("adamw8bit" in item for item in fitting):
        result = replace(result, notes=(*result.notes, "adamw8bit needs the package bitsandbytes and CUDA"))
    return replace(result, fitting=fitting, fitted=fitted, fitting_inference=_fit_inference(inference, budget))


def _fit_inference(inference: dict[str, InferenceMemory], budget: int) -> str | None:
    for attribute, words in (
        ("peak", ""),
        ("without_text_encoder", ", text encoder released by hand once prompts are embedded"),
        ("offloaded", ", one component on the device at a time, by hand"),
    ):
        for dtype, memory in inference.items():
            if getattr(memory, attribute) <= budget:
                return f"dtype {dtype}{words}: {format_size(getattr(memory, attribute))}"
    return None
