"""Learned bit widths, without Lightning: cost models, gate statistics, the gate update and the search on a budget."""
