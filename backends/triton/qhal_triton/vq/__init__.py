"""vq: dense rows of codebook weights (AQLM, VPTQ, QuIP#), the bits of `CodebookTensor.dequantize`; and products."""

from qhal_triton.vq.launch import choose as choose
from qhal_triton.vq.launch import run as run
from qhal_triton.vq.products import KERNEL as KERNEL
from qhal_triton.vq.products import bind as bind
from qhal_triton.vq.products import choose_gemm as choose_gemm
from qhal_triton.vq.tiles import tiles as tiles
