"""CLIP-FlanT5: pictures among the words of a FLAN-T5, for VQAScore. See README.md beside this."""
