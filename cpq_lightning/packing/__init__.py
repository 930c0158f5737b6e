"""The layout of the packed file, and its size before it is written. May import bitwidth and below."""
