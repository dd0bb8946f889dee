"""A run on several machines: the wire, the head's end of it, and the agent of each other machine."""
