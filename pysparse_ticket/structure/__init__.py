"""What a network consists of, found by running or tracing it: blocks that can be skipped, filters that can go."""

from .blocks import Block, Blocks, eval_mode, find_blocks
from .channels import Channels, FilterChain, filter_chains, find_channels

__all__ = [
    "Block",
    "Blocks",
    "Channels",
    "FilterChain",
    "eval_mode",
    "filter_chains",
    "find_blocks",
    "find_channels",
]
