"""SD3 and SD3.5: a diffusion transformer with a picture and a text stream. See README.md."""
