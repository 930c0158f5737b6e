"""The layout of the packed file, and its size before the file is written."""
