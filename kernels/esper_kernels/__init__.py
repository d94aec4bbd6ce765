"""GPU kernels, one folder an operation, each beside its reference.

Nothing stands here yet: see the CHANGELOG.
"""
