"""vq: dense rows of codebook weights (AQLM, VPTQ, QuIP#), the bits of `CodebookTensor.dequantize`."""

from qhal_triton.vq.launch import choose as choose
from qhal_triton.vq.launch import run as run
from qhal_triton.vq.tiles import tiles as tiles
