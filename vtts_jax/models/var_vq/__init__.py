"""VAR's multi-scale tokenizer. See README.md beside this file."""
