"""Programs for a machine with a CUDA GPU, run as ``python -m gpu.<name>`` with ``benchmarks`` on the path."""
