"""OWL-ViT and OWLv2 open-vocabulary detectors. See README.md beside this file."""
