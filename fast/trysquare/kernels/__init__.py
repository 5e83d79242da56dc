"""Triton kernels and their launchers: tensors and numbers in, no optimizer in sight. Importing them needs Triton."""

from trysquare.kernels._launch import compiling, recording

__all__ = ["compiling", "recording"]
