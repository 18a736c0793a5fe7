"""A tiny autoencoder that has trained for four steps."""

import pytest
from tiny_training import autoencoder_config

from ardiff.training.autoencoder import train_autoencoder


@pytest.fixture(scope="session")
def trained_vae(tmp_path_factory):
    return train_autoencoder(autoencoder_config(tmp_path_factory.mktemp("autoencoder")))
