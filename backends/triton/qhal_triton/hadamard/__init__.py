"""hadamard: one transform, with signs or scales before and after it, as products of 16-bit operands with fp32 sums.

`config.py` cuts a transform, `kernels.py` says why the result is that of fp32; a quantization may follow in one pass.
"""

from qhal_triton.hadamard.launch import choose as choose
from qhal_triton.hadamard.launch import fits as fits
from qhal_triton.hadamard.launch import run as run
from qhal_triton.hadamard.tiles import tiles as tiles
