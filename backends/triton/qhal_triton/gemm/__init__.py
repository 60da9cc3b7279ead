"""gemm: one kernel for every pair of formats; `paths.py` says which requests it takes, `kernels/` how it computes."""

from qhal_triton.gemm.launch import bind as bind
from qhal_triton.gemm.measuring import tune as tune
from qhal_triton.gemm.paths import choose as choose
from qhal_triton.gemm.tiles import tiles as tiles
