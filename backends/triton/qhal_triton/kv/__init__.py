"""kv: rows of keys and values quantized and written to the slots of a paged cache.

`rows.py` says which formats kernels read and write, `kernels/decode.py` has the steps of reading for `attention`.
"""

from qhal_triton.kv.launch import run as run
from qhal_triton.kv.paths import choose as choose
from qhal_triton.kv.tiles import tiles as tiles
