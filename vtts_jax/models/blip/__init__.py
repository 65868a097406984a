"""BLIP with ImageReward's head. See README.md beside this file."""
