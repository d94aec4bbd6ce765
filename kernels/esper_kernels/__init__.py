"""GPU kernels, one folder an operation, each beside its reference (see the CHANGELOG for what stands)."""
