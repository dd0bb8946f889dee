"""
Hooks for training frameworks, one module each; see docs/frameworks.

Each imports its framework when it is imported itself, so that `import stepguard` stays free of all of them.
"""
