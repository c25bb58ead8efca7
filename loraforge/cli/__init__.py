"""The command line: one file a command, each a thin call of the Python API.

No module of this room imports torch, transformers or rich at its top; the command bodies do, so that `--help`,
`methods` and shell completion start at once.
"""
