"""SiT: class-conditional flow transformers on VAE latents. See README.md beside this file."""
