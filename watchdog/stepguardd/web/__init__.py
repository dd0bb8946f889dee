"""
The page, and what it is fed with: curves, incidents, live events, Prometheus metrics.

`doors` says who may come in over TCP, `keys` makes the token, its one-time links and sessions, `reading` has
the routes that only read, `live` the stream of events, `metrics` the figures for Prometheus, and `page/` what
the browser gets. Everything here is imported late: FastAPI alone takes half a second.
"""
