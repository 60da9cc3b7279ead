"""Device code of grouped products beside those of gemm."""
