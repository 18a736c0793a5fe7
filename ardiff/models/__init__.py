"""Networks: the autoencoder (frames <-> tokens), the causal transformer and its cache. Nothing here knows the schedulers."""

from ardiff.models.autoencoder_arvae import AutoencoderARVAE
from ardiff.models.frame_cache import FrameKVCache
from ardiff.models.transformer_ardiff import ARDiffTransformerModel


__all__ = ["ARDiffTransformerModel", "AutoencoderARVAE", "FrameKVCache"]
