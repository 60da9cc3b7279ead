"""Device code of quantization: what every kernel may call (`blocks`), and the kernels of `quantize` (`grids`)."""
