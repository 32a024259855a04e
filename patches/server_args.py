"""`sglang.srt.server_args`: our flags, their way to child processes, defaults and refusals."""

from __future__ import annotations

import logging
import os
import sys

from sgl_hq import compat, preflight
from sgl_hq.config import ENV_OF_FIELD, PACK_POLICIES, SERVING_FORMATS, SWITCHES, HQConfigError, from_env
from sgl_hq.gate import admission

logger = logging.getLogger(__name__)

_HELP = {
    "format": f"KV pages that requests share are held in this format: {', '.join(SERVING_FORMATS)} (exact = none is transformed)",
    "pack": f"when a page is packed: {', '.join(PACK_POLICIES)} (default shared: when a second request uses it)",
    "packed_fraction": "auto (default): memory moves between dense and packed pages as the load wants it; or the share of the KV byte "
    "budget for packed pages, between 0 and 1",
    "page_size": "tokens per page, 64",
    "audit": "for debugging: check all books, and bytes of packed pages, every so many batches (default 0: never)",
    "audit_raise": "end the server when an audit finds something, instead of logging it",
    "allow_ungated": "serve a format that loses bits without a passed quality gate for this model (sgl-hq gate)",
}


def add_flags(original, parser):
    """AROUND ServerArgs.add_cli_args. Values stay text: `config` parses and judges them for flags and environment alike."""
    original(parser)
    group = parser.add_argument_group("HypercubeQuant", "shared KV pages held packed (plugin sgl_hq)")
    for field, text in _HELP.items():
        kind = {"action": "store_const", "const": "1"} if field in SWITCHES else {}
        group.add_argument("--hq-" + field.replace("_", "-"), dest=f"hq_{field}", default=None, help=text, **kind)


def flags_to_env(original, cls, args):
    """AROUND ServerArgs.from_cli_args: flags win over the environment; expected errors end the process with one line."""
    try:
        for field, name in ENV_OF_FIELD.items():
            value = getattr(args, f"hq_{field}", None)
            if value is not None:
                os.environ[name] = value
                os.environ.pop(name.replace("SGLANG_", "SGL_", 1), None)  # SGLang would copy it over ours in every child
        config = from_env()
        if config is not None:
            os.environ.update(config.to_env())
            preflight.check_model_path(args.model_path)
            preflight.check_port(args.host, args.port)
        return original(cls, args)
    except HQConfigError as error:
        print(f"sgl_hq: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def resolve(original, self):
    """AROUND ServerArgs.__post_init__: set what HQ needs, refuse what it cannot serve, before any weight is loaded.

    Raises HQConfigError (a ValueError, for users of sgl.Engine).
    """
    config = from_env()
    if config is None:
        if self.radix_cache_backend == "hq":
            raise HQConfigError("--radix-cache-backend hq is set by sgl_hq itself: give --hq-format instead")
        return original(self)
    compat.check_flags(self, config)
    model_path = self.model_path  # SGLang may replace it by a local copy
    self.radix_cache_backend = "hq"
    self.page_size = config.page_size
    original(self)
    model = self.get_model_config()
    compat.check_model(model, config)
    if config.packs and not str(self.device).startswith("cpu"):
        compat.check_gpu(self, model, config)
    gate = admission.gate_state(config, model_path, self.revision, self.load_format, self.json_model_override_args)
    admission.require(config, gate)
    if not gate.admits:
        logger.warning("sgl_hq: serving without a passed quality gate, as asked for: %s", gate.reason)
    # Both travel to the scheduler with these arguments, which SGLang has sealed for names without an underscore.
    self._hq_gate = gate.describe()  # for `server_state`
    self._hq_calibration = gate.calibration  # for `pool/codecs.py`


