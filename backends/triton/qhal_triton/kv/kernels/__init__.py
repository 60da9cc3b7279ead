"""Device code of caches: rows written (`write`), and read as operands of products (`decode`)."""
