"""Settings of the whole test run: no network, small models on one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

import torch

torch.set_num_threads(1)
