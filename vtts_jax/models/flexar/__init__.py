"""FlexTok AR and GridTok AR: transformers over image tokens, conditioned on text or a class."""
