"""Seconds, joules, CO2, multiply-adds, parameters and peak memory. What was not measured is None, never 0."""

from .clock import Meter, Timing, interleave
from .cost import macs, parameters, peak_bytes
from .energy import carbon_intensity
from .gpu import gpu_facts

__all__ = ["Meter", "Timing", "carbon_intensity", "gpu_facts", "interleave", "macs", "parameters", "peak_bytes"]
