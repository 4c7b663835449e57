"""Triton's side of rank 0: starting and ending PyTriton, and the one patch that it needs."""
