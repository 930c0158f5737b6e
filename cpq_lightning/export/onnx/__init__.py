"""The ONNX format. It needs the extra ``onnx``. May import what export may."""
