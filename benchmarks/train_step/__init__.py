"""What a training step costs, quantized in several ways, against full precision and against each other."""
