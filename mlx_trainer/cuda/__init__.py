"""CUDA kernels for what a step does besides products and attention.

`compiler.py` makes programs of the sources beside it and runs them, `kernels.py` has the kernels as functions. Where
there is no CUDA, or a kernel cannot be compiled or run, callers do the same with MLX's operations.
"""
