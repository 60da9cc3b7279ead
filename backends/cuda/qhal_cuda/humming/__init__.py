"""Weight-only products through the library humming-kernels 0.1.19: what it does exactly as asked, nothing else."""

from qhal_cuda.humming.choice import choose as choose
from qhal_cuda.humming.weight import HummingWeight as HummingWeight
from qhal_cuda.humming.weight import build as build
from qhal_cuda.humming.weight import restore as restore
