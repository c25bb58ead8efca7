"""Linear algebra on factored updates and small cores. Knows tensors only: no adapter, no file, no model."""
