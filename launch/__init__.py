"""The command `sgl-hq`: start a server, compare servers, install a demo model, check an installation."""
