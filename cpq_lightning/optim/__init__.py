"""The quantizers' parameters, trained by hooks of optimizers that were built without them."""
