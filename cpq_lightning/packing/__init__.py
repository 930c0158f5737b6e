"""The layout of the packed file: what it holds, and how many bytes that is before the file exists."""
