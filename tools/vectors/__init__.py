"""Test vectors of the format, made without `squizd`: a second implementation of its writing side.

Shares no code with the package, so that a misreading of the spec shows as a disagreement.
"""
