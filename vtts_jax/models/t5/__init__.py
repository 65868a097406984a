"""T5 encoder: FLAN-T5 and T5 v1.1 layouts. See README.md beside this file."""
