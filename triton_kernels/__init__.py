"""Triton kernels and their launchers, installed as `survfuse.triton_kernels`."""
