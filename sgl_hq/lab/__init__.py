"""The measurement lab: is a speed-up of attention possible on this machine, and would the answers survive it?

    projection.py, attention_share.py     ceiling: the share of a decode step that attention takes, and what follows
    selectors.py ... oracle.py            oracle: attending to fewer tokens, on the real model, judged step by step
    cosines.py, frontier.py               frontier: bits against quality over all formats

The rule that it serves: nothing is built before its ceiling and its oracle both pass on the same model and context.
"""
