"""
What the run has been through, as people look at it: the reward curve, the incidents, what was told.

`curve` keeps points and thins them for drawing, `chronicle` takes in each decision as it is made. The journal
keeps the same on disk, so that a daemon that comes back draws the whole curve.
"""
