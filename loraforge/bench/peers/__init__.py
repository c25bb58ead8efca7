"""Peers: what a competent PyTorch user would write, so that the benchmarks compare with something real."""
