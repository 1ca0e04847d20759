"""What tickets are like: their layers, their weights' history, the valleys and the features that they lead to.

``pysparse_ticket.overlap`` compares masks; everything else that the papers look at is here.
"""

from .connectivity import Connectivity, linear_connectivity
from .features import cka, cka_between, ticket_cka
from .layers import LayerProfile, collapsed_layers, layer_profile
from .trajectory import sign_flips, weight_spread, weight_travel

__all__ = [
    "Connectivity",
    "LayerProfile",
    "cka",
    "cka_between",
    "collapsed_layers",
    "layer_profile",
    "linear_connectivity",
    "sign_flips",
    "ticket_cka",
    "weight_spread",
    "weight_travel",
]
