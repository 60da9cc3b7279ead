"""Triton kernels that the GPU backends share, and TritonOps over them (distribution qhal-triton)."""
