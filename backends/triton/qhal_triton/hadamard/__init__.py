"""hadamard: one transform, with signs or scales before and after it, as products of 16-bit operands with fp32 sums.

`config.py` cuts a transform, `kernels/rotate.py` says why the result is that of fp32; a quantization may follow in one
pass. Every other chain, and features in fp32: `mixing.py`, matrix by matrix in fp32.
"""

from qhal_triton.hadamard.launch import choose as choose
from qhal_triton.hadamard.launch import fits as fits
from qhal_triton.hadamard.launch import run as run
from qhal_triton.hadamard.tiles import tiles as tiles
