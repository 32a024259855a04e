"""A TCP port for a server that binds it only once its model is loaded, half a minute after the port was chosen.

The system's own choice (bind to port 0) is an ephemeral port, and within that half minute it may go to anybody who asks for one:
an outgoing connection, another server's torch.distributed store. So ports are taken from below that range, and whoever takes one
keeps an abstract Unix socket of that name, which no second process can have and which ends with its holder.
"""

from __future__ import annotations

import random
import socket

from sgl_hq.config import HQConfigError
from sgl_hq.preflight import check_port

HOST = "127.0.0.1"
# Linux hands out ephemeral ports from 32,768 on (net.ipv4.ip_local_port_range).
PORTS = range(20_000, 32_000)


class PortClaim:
    """`port`: free on 127.0.0.1, and no other claim's, of this process or another, until `release()` or the end of the process.

    Raises:
        RuntimeError: every port of PORTS is claimed or in use.
    """

    def __init__(self) -> None:
        for port in random.sample(PORTS, len(PORTS)):
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0sgl-hq-port-{port}")
                check_port(HOST, port)
            except (OSError, HQConfigError):
                claim.close()
                continue
            self.port, self._claim = port, claim
            return
        raise RuntimeError(f"every port from {PORTS[0]} to {PORTS[-1]} is in use or claimed; end servers that are no longer needed")

    def release(self) -> None:
        """The port may be chosen again; calling it twice does nothing."""
        self._claim.close()
