"""The UNet of Stable Diffusion 1.5, 2.1 and SDXL. See README.md beside this file."""
