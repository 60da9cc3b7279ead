"""Device code of products."""
