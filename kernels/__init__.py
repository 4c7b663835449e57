"""GPU kernels in the Triton language, one a file: the kernel, a checked wrapper and its reference in plain torch.

They know tensors and nothing of the engine. The language is triton-lang's, no kin of the Triton that serves.
"""
