"""Attention with a span per KV head on NVIDIA GPUs: Triton kernels, their PyTorch ops and ahead-of-time builds."""
