"""Tests compile many tiny programs: LLVM's lowest optimisation level compiles them a third
faster."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
