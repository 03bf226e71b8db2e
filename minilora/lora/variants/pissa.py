"""PiSSA (Meng et al. 2024, arXiv 2404.02948, equations 2 to 4): start from the principal singular directions of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.variants.residual import ResidualLoRA


@register("pissa")
class PiSSALinear(ResidualLoRA):
    """``A = sqrt(S_r / s) V_r^T`` and ``B = U_r sqrt(S_r / s)``, so that ``s B A`` is the best rank-r part of W.

    "pissa_niter_N" takes a randomized SVD with N power iterations, much faster for large layers and not exact.
    """

    def part_of(self, weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
        if config.pissa_rounds is None:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):  # a fixed seed: a reloaded file must find the same start again
                torch.manual_seed(0)
                U, S, V = torch.svd_lowrank(weight, q=self.r, niter=config.pissa_rounds)
            Vh = V.T
        root = (S[: self.r] / self.scaling).sqrt()
        return root[:, None] * Vh[: self.r], U[:, : self.r] * root
