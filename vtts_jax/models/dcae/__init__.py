"""DC-AE: the deep-compression autoencoder of SANA. See README.md beside this file."""
