"""AdamW, and Muon for the matrices of the blocks. Knows nothing of losses or schedules.

Weight decay goes to the matrices of linear and convolutional layers only: norms, biases, embeddings and positions
have no reason to shrink.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from unialignment.errors import ConfigError
from unialignment.training.config import OptimizerSection

_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to."""
    return {
        f"{name}.weight" if name else "weight" for name, module in model.named_modules() if isinstance(module, _DECAYED)
    }


def build_optimizer(model: nn.Module, options: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of all parameters that require gradients.

    Args:
        model: What is trained.
        options: Its configuration.
    """
    decayed = decayed_parameters(model)
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_block = name in decayed and parameter.ndim == 2 and "blocks." in name and "norm" not in name
        if options.name == "muon" and in_block:
            matrices.append(parameter)
        else:
            (with_decay if name in decayed else without).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": with_decay, "weight_decay": options.weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "adamw8bit":
        return _adamw_8bit(groups, options)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for g in groups for p in g["params"])
    if options.name == "muon":
        return Muon(matrices, groups, options, fused)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)


def _adamw_8bit(groups: list[dict[str, Any]], options: OptimizerSection) -> torch.optim.Optimizer:
    """AdamW whose moments take one byte each.

    Raises:
        ConfigError: its package or a CUDA device is missing.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimizer.name=adamw8bit needs the package bitsandbytes and a CUDA device: pip install bitsandbytes, "
            "or use adamw."
        ) from error
    if any(p.device.type != "cuda" for group in groups for p in group["params"]):
        raise ConfigError("optimizer.name=adamw8bit needs a CUDA device; use adamw here.")
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    return optimizer


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices with nearly the same singular vectors and singular values near one.

    Newton-Schulz iteration with Muon's quintic, X <- a X + b (X X^T) X + c (X X^T)^2 X
    (https://kellerjordan.github.io/posts/muon). X X^T is formed anew from X in every iteration: carrying it along
    instead would save work on wide matrices, but in bfloat16 its rounding errors grow twelvefold an iteration, and
    gradients of low rank then explode.

    Args:
        matrices: ``[n, rows, columns]`` of one shape, treated as a batch.
        steps: Iterations.

    Returns:
        ``[n, rows, columns]``.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _fast_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it; the iteration tolerates its rounding."""
    fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Muon (momentum, orthogonalised) for the blocks' matrices, AdamW for everything else.

    The update has root-mean-square 0.2 like AdamW's (arXiv 2502.16982, equation 4), so both share one learning
    rate. Matrices of one shape are orthogonalised as one batch.

    Args:
        matrices: Parameters for Muon, two-dimensional.
        groups: Parameter groups for AdamW.
        options: The configuration.
        fused: Use the fused AdamW kernel.
    """

    def __init__(
        self, matrices: list[nn.Parameter], groups: list[dict[str, Any]], options: OptimizerSection, fused: bool
    ) -> None:
        muon: dict[str, Any] = {"params": matrices, "weight_decay": options.weight_decay, "muon": True}
        defaults = {
            "lr": options.lr,
            "betas": list(options.betas),
            "eps": options.eps,
            "momentum": options.momentum,
            "muon": False,
            "fused": fused,
            "capturable": False,
            "weight_decay": options.weight_decay,
        }
        super().__init__(([muon] if matrices else []) + groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients in place."""
        if closure is not None:
            raise ValueError("Muon takes no closure.")
        for group in self.param_groups:
            if group["muon"]:
                self._muon(group)
            else:
                self._adamw(group)

    def _muon(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                shapes[tuple(parameter.shape)].append(parameter)
        for shape, parameters in shapes.items():
            buffers = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
                buffers.append(state["momentum_buffer"])
            gradients = [p.grad.float() for p in parameters if p.grad is not None]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            looked_ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov
            stacked = torch.stack(looked_ahead)
            updates = orthogonalise(stacked.to(_fast_type(stacked.device))).float() * (0.2 * max(shape) ** 0.5)
            own: list[Tensor] = list(parameters)
            if group["weight_decay"]:
                torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            changes = [u.to(p.dtype) for u, p in zip(updates.unbind(), parameters, strict=True)]
            torch._foreach_add_(own, changes, alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                place = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        if not parameters:
            return
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
