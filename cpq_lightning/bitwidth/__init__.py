"""Learned widths, without Lightning: what widths cost, what a bit is worth to the loss, the search on a budget."""
