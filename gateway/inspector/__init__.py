"""The live inspector: what every session waits for, where its KV is, and why.

`rows` renders sessions and pods, `feed` keeps watchers up to date, `endpoints` serves both and the
page itself, whose files lie in ``page``.
"""
