"""The filter ticket that a layer ticket is judged against: as many filters removed (Jordao et al. 2023, Table 3)."""

from __future__ import annotations

from torch import nn

from ..ticket import Ticket
from .at_init import at_init


def filters_removed(model: nn.Module, layer_ticket: Ticket) -> int:
    """Filters of all convolutions in the blocks that a layer ticket removes, 1x1 projections included.

    ResNet-32 has 1232 filters by this count, and 1200 without one block of its first stage.
    """
    blocks = [model.get_submodule(name) for name in layer_ticket.removed_blocks]
    return sum(m.out_channels for block in blocks for m in block.modules() if isinstance(m, nn.Conv2d))


def filter_twin(model: nn.Module, layer_ticket: Ticket, batches=None, *, score: str | None = None, **options) -> Ticket:
    """The filter ticket that removes exactly as many filters as the layer ticket's blocks have.

    score    as of :func:`at_init`; None for the layer ticket's own
    options  further ones of :func:`at_init`: aggregate, coupled, keep, bn_mode, seed, ...

    Raises TicketError when the layer ticket is for another architecture, ValueError when it removes no block, when no
    score is known, or when no choice of filters has exactly that count.
    """
    layer_ticket.check(model)
    count = filters_removed(model, layer_ticket)
    if not count:
        raise ValueError("the layer ticket removes no convolution, so there is no number of filters to match")
    score = score or layer_ticket.provenance.get("score")
    if score is None:
        raise ValueError("the layer ticket does not say which score found it; pass score=")
    ticket = at_init(model, batches, score=score, granularity="filter", remove=count, **options)
    ticket.provenance["twin_of"] = layer_ticket.removed_blocks
    return ticket
