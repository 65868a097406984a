"""DreamSim, a learned distance between pictures. See README.md beside this file."""
