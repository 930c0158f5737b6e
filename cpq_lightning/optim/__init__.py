"""Optimizer hooks that train the quantizers' parameters, which the user's optimizer does not contain."""
