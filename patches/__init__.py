"""Every place where sgl_hq changes SGLang beyond its official extension points.

`ledger.py` is the list, as data; `probe.py` checks each entry against the installed SGLang; the other files hold the
hooks, one SGLang module each. Nothing happens on import: `sgl_hq.plugin.register` registers the entries with SGLang's
own HookRegistry. An empty ledger is the goal.
"""
