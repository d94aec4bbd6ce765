"""Grow PyTorch models with the same pure functions (see the CHANGELOG for what stands)."""
