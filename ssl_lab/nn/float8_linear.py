"""The linear map that trains in float8; importing it imports torchao, so `ssl_lab.nn.float8` does that when asked."""

import torch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear

from ssl_lab.nn.linear import Linear


class Float8Map(Float8Linear, Linear):  # type: ignore[misc]
    """`Linear`, (..., D) -> (..., E), whose three products (output, both gradients) have float8 factors in training.

    Weight, bias, gradients and results keep their dtypes. Without gradients, in evaluation and generation, it is an
    ordinary `Linear`, so what is measured is what the exported weights do in any program.
    """

    before_float8 = Linear  # see `ssl_lab.nn.float8.ordinary_`

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return Linear.forward(self, x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # torchao itself asks for the autocast of GPUs alone
        out: Tensor = super().forward(x)
        return out

    def rows(self, x: Tensor, start: int = 0, stop: int | None = None, add: Tensor | None = None) -> Tensor:
        """See `Linear.rows`; a part of the outputs is computed in the precision of the run.

        Such a part need not be a multiple of 16 wide, and only the last block of a network asks for one.
        """
        if start or stop is not None:
            return Linear.rows(self, x, start, stop, add)
        out = self(x)
        return out if add is None else out + add.to(out.dtype)
