"""Loops over packed codes that numba compiles: the same bits as the tensor operations beside which they stand, sooner.

Import nothing from here but through `compiled.loops()`, which is None where numba is not installed (`pip install
qhal[fast]`) or the tensors are not a processor's. One module per kind of packing; each loop takes numpy arrays, writes
into one that the caller made, and lets other threads run.
"""
