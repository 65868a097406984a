"""Live parity against torch: collected only where the `parity` extra is installed.

pip install torch (its CPU build, if you like), then `pip install -e '.[test,parity]'`.
"""

import importlib.util

NEEDED = ('torch', 'transformers', 'diffusers')
if not all(importlib.util.find_spec(name) for name in NEEDED):
  collect_ignore_glob = ['*.py']
