"""The one-shot check of a machine: finds what runs here by itself, and says what is well and what is not."""
