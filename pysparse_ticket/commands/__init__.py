"""The commands of ``pysparse-ticket``, a file each; ``cli.py`` puts them together."""
