"""Training of the quantizers' parameters, by hooks of optimizers. May import nn and below."""
