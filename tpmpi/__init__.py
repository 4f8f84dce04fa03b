"""tpmpi: tensor-parallel inference of language models with NumPy or CuPy, MPI and HDF5."""

__version__ = '0.1.0'


def load(*arguments, **options):
    """Load a model on all ranks; see tpmpi.api.load."""
    from tpmpi.api import load  # imported late: the BLAS threads are chosen before NumPy starts them
    return load(*arguments, **options)
