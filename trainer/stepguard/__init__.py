"""
Stepguard inside the training process: the gate before each optimizer step.

Standard library only, by promise: installing it brings nothing into a training environment.
"""

__version__ = "0.1.0"
