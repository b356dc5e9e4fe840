"""Random rounding: every number that is computed is off by about as much as float32 rounds.

A runtime adds in another order and has other formulas for an exponential, so that each of its
numbers differs in the last digits, by itself. Noise on the pixels does not show what that changes:
it moves patches that are nearly alike together, and a cosine of two of them hardly at all.
Computing several times with random errors is known as Monte Carlo arithmetic (Parker, 1997).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROUNDING = 2.0**-20  # of the errors, as a share of the number: some last digits of float32
POOL = 2**16 + 1  # numbers that are drawn at once
# PyTorch's operations that compute numbers. All others move them, compare them or make them anew.
COMPUTING = frozenset(
    """convolution mm bmm addmm baddbmm dot mv _softmax _safe_softmax _log_softmax
    native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit_no_training
    mean sum var std linalg_vector_norm cumsum logsumexp exp expm1 log log1p div mul add sub rsub
    pow sqrt rsqrt reciprocal sigmoid tanh erf gelu elu silu hardswish hardsigmoid softplus sin cos
    scatter_add scatter_reduce index_add _euclidean_dist _cdist_forward _fused_rms_norm
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
    _scaled_dot_product_efficient_attention scaled_dot_product_attention""".split()
)


class RandomRounding(TorchDispatchMode):
    """Within it, what PyTorch computes is off at random. Whole numbers are exact, and stay."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's mode has no types
        self.generator = generator
        drawn = torch.randn(POOL, generator=generator, dtype=torch.float64)
        factors = 1 + ROUNDING * drawn
        self.factors = {dtype: factors.to(dtype) for dtype in (torch.float64, torch.float32)}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carries out an operation, and rounds what it computes."""
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in COMPUTING:
            return tree_map_only(Tensor, self._round, result)
        if name.endswith("_") and name[:-1] in COMPUTING:  # in place
            result.copy_(self._round(result))
        return result

    def _round(self, x: Tensor) -> Tensor:
        """Moves each number by about a last digit."""
        if not x.is_floating_point():
            return x
        # Numbers are drawn once, and every operation begins at another of them: a number for each
        # result would take several times as long as the model itself.
        pool = self.factors[torch.float64 if x.dtype == torch.float64 else torch.float32]
        if x.numel() >= POOL:
            pool = pool.repeat(2 + x.numel() // POOL)
        first = int(torch.randint(len(pool) - x.numel(), (), generator=self.generator))
        factors = pool[first : first + x.numel()].view(x.shape)
        return torch.where(x == x.round(), x, (x * factors).to(x.dtype))
