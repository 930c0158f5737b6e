"""ONNX export: graphs of QuantizeLinear and DequantizeLinear for ONNX Runtime. It needs the extra ``onnx``."""
