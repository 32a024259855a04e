"""The quality gate: is a page format good enough to serve on this model?"""
