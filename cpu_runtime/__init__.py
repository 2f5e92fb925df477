"""Runs artefacts on CPUs: ONNX Runtime with the op library `libattnspan_ort`."""
