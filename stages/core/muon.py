"""Muon: momentum whose update is orthogonalised, for matrices and convolutions; AdamW for everything else.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). The same update of matrices as timm's `nmuon`,
at half its time on a CPU: the Newton-Schulz iteration runs on the small Gram matrix instead of on the whole update.
torch.optim.Muon takes no convolutions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stages.core.precision import has_bf16

# Quintic coefficients of modded-nanogpt (https://leloykun.github.io/ponder/muon-opt-coeffs/), timm's default too.
_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# The Gram matrix is computed anew after the second iteration. Without it the rounding of bfloat16 grows without bound
# when the update is nearly of low rank (tests/stages/core/test_muon.py).
_RUNS = (_COEFFICIENTS[:2], _COEFFICIENTS[2:])


class Muon(torch.optim.Optimizer):
    """Nesterov Muon whose update has the RMS of AdamW's (Moonlight, arXiv 2502.16982), so that rates carry over."""

    def __init__(self, params: Any, lr: float | Tensor, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            rest, matrices = [], defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.ndim < 2 or min(parameter.shape[:2]) == 1:  # biases, norms, depthwise convolutions
                    rest.append(parameter)
                else:
                    # On a GPU a small product costs its launch, so matrices of one shape are one batch.
                    shape = (len(parameter), parameter[0].numel())
                    matrices[shape if parameter.is_cuda else id(parameter)].append(parameter)
            for parameters in matrices.values():
                self._update_matrices(parameters, group)
            if rest:
                self._update_rest(rest, group)

    def _update_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters whose matrices have one shape."""
        updates = [self._direction(parameter, group["momentum"]) for parameter in parameters]
        # The columns' order does not matter to the result, so a channels_last kernel is a matrix without a copy.
        columns_last = [update.movedim(1, -1) for update in updates]
        matrices = [update.reshape(len(update), -1) for update in columns_last]
        # Emulated, bfloat16 makes a step of ResNet-18 take half a minute on a CPU.
        dtype = torch.bfloat16 if has_bf16(matrices[0].device) else torch.float32
        if len(matrices) > 1:
            orthogonal = orthogonalise(torch.stack(matrices), dtype)
        else:
            orthogonal = orthogonalise(matrices[0], dtype)[None]
        # The rate may be a tensor, and must not be read back from the device.
        keep, scale = 1 - group["lr"] * group["weight_decay"], group["lr"] * (0.2 * max(matrices[0].shape) ** 0.5)
        for parameter, like, step in zip(parameters, columns_last, orthogonal, strict=True):
            parameter.mul_(keep)
            parameter.sub_(step.view_as(like).movedim(-1, 1) * scale)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov momentum."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        gradient, buffer = parameter.grad, state["momentum_buffer"]
        assert gradient is not None
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)

    def _update_rest(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    # Not "step": loading a state would leave that name's tensor on the CPU.
                    "count": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["count"] for state in states],
            fused=True,
            capturable=parameters[0].is_cuda,
            amsgrad=False,
            beta1=0.9,
            beta2=0.95,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-7,
            maximize=False,
        )


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly the orthogonal factor of the polar decomposition of matrices (..., m, n): singular values near 1.

    At most one dimension before the matrix's two; the result is of `dtype`. Five Newton-Schulz steps
    X <- (a I + b G + c G^2) X with G = X X^T. All steps of a run are polynomials of the first G, so they are multiplied
    as (m, m) matrices, and X itself only once a run.
    """
    if matrix.size(-2) > matrix.size(-1):
        return orthogonalise(matrix.mT, dtype).mT
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    x: Tensor = (matrix / norm.clamp(min=1e-7)).to(dtype)
    add_product = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    for run in _RUNS:
        gram = x @ x.mT
        product: Tensor | None = None
        for i, (a, b, c) in enumerate(run):
            factor = add_product(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            if i + 1 < len(run):
                gram = factor @ (gram @ factor)
        assert product is not None
        x = product @ x
    return x
