"""TiTok: a picture as 32 to 256 tokens in one dimension. See README.md."""
