"""The one error for what cannot be run."""


class ConfigError(ValueError):
  """A setting that cannot be run; its message names the setting, the value and what is allowed."""
