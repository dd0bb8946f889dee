"""
Checkpoints: where they lie, whether they can be trusted, which one to go back to, and going back.

`layouts` knows the frameworks, `completeness` their files, `vetting` judges, `ledger` remembers, `choice`
decides, `pinning` keeps, `rollback` acts and takes back, `offline` does it all without a daemon.
"""
