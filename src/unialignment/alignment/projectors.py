"""The MLPs that carry hidden states into a teacher's space. Knows neither the model nor the teacher, only widths."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from unialignment.alignment.losses import mean_pool


class AlignmentProjector(nn.Module):
    """Mean pooling, then an MLP.

    Published: ``Linear → SiLU → Linear → SiLU`` on the mean over all tokens. The last activation keeps every output
    above −0.28, where no direction with a clearly negative component can be reached; ours ends linearly. The per-token
    form (REPA, arXiv 2410.06940) skips the pooling.

    Args:
        input_dim: Width of the hidden states.
        output_dim: Width of the teacher's embeddings.
        hidden_dim: Width between the two layers (2048 in the published model).
        pool: Pool the tokens first; otherwise every token is projected.
        published: End with the activation, as the published code does.
    """

    def __init__(
        self, input_dim: int, output_dim: int, hidden_dim: int = 2048, pool: bool = True, published: bool = False
    ) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = [nn.Linear(input_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, output_dim)]
        self.fc = nn.Sequential(*layers, nn.SiLU()) if published else nn.Sequential(*layers)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project hidden states.

        Args:
            tokens: ``[B, N, D]`` (or pooled ``[B, D]``).
            mask: ``[B, N]``, true at tokens that count in the mean.

        Returns:
            ``[B, D_teacher]``, or ``[B, N, D_teacher]`` without pooling.
        """
        return cast(Tensor, self.fc(mean_pool(tokens, mask) if self.pool else tokens))
