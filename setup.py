"""Packaging of vtts_jax: visual test-time scaling via search, in JAX/Flax."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
  name='vtts_jax',
  version='0.2.0',
  description='Visual test-time scaling via search, in JAX/Flax, for TPUs',
  long_description=Path('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  python_requires='>=3.11',
  packages=find_packages(include=['vtts_jax', 'vtts_jax.*']),
  package_data={
    'vtts_jax': ['report/*.j2', 'scenes/assets/*', 'data/assets/geneval/*', 'models/sana/*.txt']
  },
  install_requires=[
    'jax>=0.10',
    'flax>=0.12',
    'optax',
    'orbax-checkpoint',
    'safetensors',
    'transformers',  # tokenizers and configs
    'huggingface_hub',
    'ftfy',  # CLIP's cleaning of texts
    'pyyaml',
    'ml_collections',
    'absl-py',
    'etils[epath]',
    'numpy',
    'pillow',
    'matplotlib',
    'jinja2',
    'rich',
  ],
  extras_require={
    'test': ['pytest', 'pytest-xdist', 'hypothesis', 'scipy', 'ruff', 'mctx', 'pillow>=13'],
    'parity': ['torch', 'transformers', 'diffusers'],
    'tpu': ['jax[tpu]'],
  },
  entry_points={'console_scripts': ['vtts = vtts_jax.cli.main:run_cli']},
)
