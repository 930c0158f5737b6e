"""ONNX: a graph of QuantizeLinear and DequantizeLinear, arranged for ONNX Runtime. Needs the extra ``onnx``."""
