"""Triton kernels and the host functions that launch them: on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1."""

from attnspan.plugins.trt_sparse_attn.kernels.lsh_hash import lsh_hash
from attnspan.plugins.trt_sparse_attn.kernels.merge import merge
from attnspan.plugins.trt_sparse_attn.kernels.ring_update import ring_update
from attnspan.plugins.trt_sparse_attn.kernels.span_attention import span_attention
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import span_decode
from attnspan.plugins.trt_sparse_attn.kernels.span_prefill import span_prefill

__all__ = ["lsh_hash", "merge", "ring_update", "span_attention", "span_decode", "span_prefill"]
