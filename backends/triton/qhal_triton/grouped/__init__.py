"""grouped: gemm's kernel over the rows of every expert; `rows.py` says which those are, `launch.py` what follows."""

from qhal_triton.grouped.launch import known as known
from qhal_triton.grouped.launch import run as run
from qhal_triton.grouped.paths import choose as choose
from qhal_triton.grouped.tiles import tiles as tiles
