"""Infinity: draws pictures scale by scale, bit by bit. See README.md beside this file."""
