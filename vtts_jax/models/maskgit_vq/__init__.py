"""MaskGIT's tokenizer, a VQ autoencoder. See README.md."""
