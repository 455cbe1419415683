"""Errors that name an instruction and the line of Python that it was compiled from."""


class KernelError(RuntimeError):
    """A kernel does what no GPU would forgive, or what this emulator does not model."""
