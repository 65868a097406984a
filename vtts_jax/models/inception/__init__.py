"""InceptionV3 as FID and Inception Score use it. See README.md beside this file."""
