"""FLUX.1: a guidance-distilled flow over picture latents. See README.md beside this file."""
