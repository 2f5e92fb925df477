"""Existing ONNX files: their attention is recognised and lifted into the normal form."""
