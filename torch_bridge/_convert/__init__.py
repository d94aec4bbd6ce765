"""Values and functions between torch and JAX.

- `tree_to_jax`, `tree_to_torch`: pytrees, by DLPack.
- `to_torch`: a JAX function as a torch function.
"""
