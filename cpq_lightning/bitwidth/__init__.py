"""Learned widths: costs, constraints, gate statistics, the search. May import checkpoint and below."""
