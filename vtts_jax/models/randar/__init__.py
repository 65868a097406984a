"""RandAR: picture tokens in any order. See README.md."""
