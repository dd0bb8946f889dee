"""The stand-in for slime."""
