"""The place of a removed block."""

from __future__ import annotations

from torch import Tensor, nn


class LayerSkip(nn.Module):
    """Returns its input: equivalent to ``nn.Identity()``, with nothing stored or computed of the removed block.

    It keeps the block's place in its container, so the names of the surviving parameters stay the dense network's.
    Further arguments that the block took (an attention mask, say) are accepted and ignored.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x
