"""What bundles cost, beside the programs that a user would pick instead, and beside what the
machine itself can do.

`run` says what is measured and in which turns, `workers` holds each party in a process of its own,
`ours` reads with a bundle, `yardsticks` measures the machine, `accounting` counts bytes and
operations, `figures` says how figures are kept.
"""
