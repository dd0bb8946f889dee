"""
What people are told, whom, and when. Pure: the channels themselves are in `stepguardd.alerts`.

`facts` says what a message may know, `book` decides which message goes where and when, `words` writes it.
"""
