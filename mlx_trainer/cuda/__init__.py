"""CUDA kernels for what a step does besides products and attention.

`llama.cu` and `adapters.cu` are their sources, `compiler.py` makes them ready, `kernels.py` has them as functions.
Where there is no CUDA, or they cannot be compiled, callers do the same with MLX's operations.
"""
