"""SANA, SANA-1.5 and SANA-Sprint: diffusion transformers with linear attention. See README.md."""
