"""LlamaGen: a Llama that draws pictures token by token. See README.md beside this file."""
