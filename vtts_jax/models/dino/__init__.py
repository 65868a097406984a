"""DINO and DINOv2 image encoders, with registers and linear heads. See README.md beside this
file."""
