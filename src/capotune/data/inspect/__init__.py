"""What data looks like before a minute is spent on training, as plain values; each face draws them itself.

``labels`` measures labelled text, ``samples`` text to write, ``measures`` is what both count in.
"""
