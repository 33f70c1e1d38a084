"""Settings that every test runs under."""

import torch

# The tensors are tiny: a second thread would cost more than it does, and tests run side by side.
torch.set_num_threads(1)
