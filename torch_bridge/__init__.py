"""Grow PyTorch models with the same pure functions.

Nothing stands here yet: see the CHANGELOG.
"""
