"""Monte-Carlo tree search over prefixes: policy, value and rollout, many leaves a step."""

from vtts_jax.search.mcts.search import MCTS as MCTS
from vtts_jax.search.mcts.search import build as build
