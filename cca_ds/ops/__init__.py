"""The operations that models are written in.

Each op is one function that picks its implementation from device, dtype and what was built: a kernel of csrc/, or plain
PyTorch. The plain version is public too, as `*_eager`, and gives the same numbers up to rounding.
"""
