"""Merge methods: one file a method, one row in `methods.METHODS`, one runner.

The room is called `merging` because `loraforge.merge` is the function.
"""
