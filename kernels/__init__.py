"""Triton kernels, one file an op; installed as ``pysparse_ticket.kernels``."""
