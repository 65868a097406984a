"""SigLIP and SigLIP 2 of fixed resolution. See README.md beside this file."""
