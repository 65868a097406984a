"""RAR: a transformer over the tokens of a picture, trained in random orders. See README.md."""
