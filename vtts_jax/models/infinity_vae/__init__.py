"""Infinity's tokenizer of bits. See README.md beside this file."""
