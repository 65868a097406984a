"""LlamaGen's tokenizer, a VQ autoencoder. See README.md of models/llamagen."""
