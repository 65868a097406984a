"""Janus: a language model that draws pictures and reads them. See README.md."""
