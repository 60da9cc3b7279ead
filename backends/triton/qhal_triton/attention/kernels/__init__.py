"""Device code of attention."""
