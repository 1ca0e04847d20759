"""What the papers' tickets are worth on the embedded data, one file a table: see docs/tickets.md.

cd benchmarks && python -m evidence
"""
