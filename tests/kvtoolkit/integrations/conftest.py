"""What tests of models share."""

import pytest


@pytest.fixture
def quiet():
    """What transformers says of configurations made tiny is not about us."""
    import warnings

    import torch
    import transformers

    before, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)
    torch.set_num_threads(threads)
