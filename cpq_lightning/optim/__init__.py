"""Training of the quantizers' parameters, by hooks of optimizers. May import attach, backbones, nn and below."""
