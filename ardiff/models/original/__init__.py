"""Architectures of the checkpoints that the authors of AR-Diffusion published; `ardiff convert` writes folders of them."""

from ardiff.models.original.autoencoder_original import AutoencoderOriginal
from ardiff.models.original.transformer_original import OriginalTransformerModel


__all__ = ["AutoencoderOriginal", "OriginalTransformerModel"]
