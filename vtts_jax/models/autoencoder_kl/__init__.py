"""AutoencoderKL: the picture autoencoder of latent generators. See README.md beside this file."""
