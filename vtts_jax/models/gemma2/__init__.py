"""Gemma-2, a language model, as the text encoder of SANA. See README.md."""
