"""
How people and programs talk to a running daemon: HTTP with JSON, over a Unix socket in the run's folder.

`contract` says what is asked and answered, `api` is the application, `server` puts it on the socket and
checks who calls, `client` is the other end. `api` brings in FastAPI: `server` imports it late.
"""
