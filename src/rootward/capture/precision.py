"""Products in bfloat16 where that is faster and the result is a statistic over many tokens anyway.

Inputs are rounded to 8 bits of mantissa, the processor sums in float32, the product is rounded again: up to 0.4 % of an
entry. A covariance is therefore taken of `TOKENS` tokens at a time and added up in float32, so that the roundings are
independent and average out instead of adding up with the sum. For a covariance of thousands of tokens, or the square of
a rotated gradient that is damped by a tenth of its mean, that is far below the error of the sample. Eigenvectors of
eigenvalues below a thousandth of the largest are not to be relied on; the eigenvalues in whatever basis comes out are.
Only factors are made so; the products with documents that give the scores never are. ``bf16 = "never"`` (methods:
``fit_bf16``) turns it off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WIDE = 512
"""Width from which it pays."""
TOKENS = 512
"""Tokens whose sum of outer products is rounded before it is added to the others in float32."""


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself: else it would be slower, not faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    supported: Callable[[], Any] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


def product(a: Tensor, b: Tensor, *, quick: bool) -> Tensor:
    """``a @ b``; with ``quick`` in bfloat16 where both are float32 and the summed width or the result's is wide."""
    if quick and a.dtype == b.dtype == torch.float32 and max(b.shape[-2:]) >= WIDE:
        return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b
