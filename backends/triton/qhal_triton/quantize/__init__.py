"""quantize: scales and codes in one kernel, bit for bit those of `qhal.encoding.encode`.

`recipe.py` says which formats and rules, `kernels/blocks.py` has the steps for other kernels to call.
"""

from qhal_triton.quantize.launch import choose as choose
from qhal_triton.quantize.launch import empty as empty
from qhal_triton.quantize.launch import fits as fits
from qhal_triton.quantize.launch import matrix as matrix
from qhal_triton.quantize.launch import run as run
from qhal_triton.quantize.launch import takes as takes
from qhal_triton.quantize.recipe import Recipe as Recipe
from qhal_triton.quantize.recipe import recipe as recipe
from qhal_triton.quantize.tiles import tiles as tiles
