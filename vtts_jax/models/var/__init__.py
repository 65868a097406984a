"""VAR: draws pictures scale by scale. See README.md beside this file."""
