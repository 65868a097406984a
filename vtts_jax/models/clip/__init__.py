"""CLIP: OpenAI's, OpenCLIP's and their fine-tunes, both layouts. See README.md beside this file."""
