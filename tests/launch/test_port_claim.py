"""Ports that servers are given long before they bind them."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from sgl_hq.launch import port_claim
from sgl_hq.launch.port_claim import HOST, PortClaim

CLAIM_FROM = """
import sys
from sgl_hq.launch import port_claim
port_claim.PORTS = range(int(sys.argv[1]), int(sys.argv[2]))
claim = port_claim.PortClaim()
print(claim.port, flush=True)
sys.stdin.read()
"""


def _only(monkeypatch, ports: range) -> None:
    monkeypatch.setattr(port_claim, "PORTS", ports)


def test_no_port_is_claimed_twice():
    claims = [PortClaim() for _ in range(100)]
    assert len({claim.port for claim in claims}) == 100


def test_a_port_in_use_is_not_claimed(monkeypatch):
    with socket.socket() as other:
        other.bind((HOST, 0))
        _only(monkeypatch, range(other.getsockname()[1], other.getsockname()[1] + 1))
        with pytest.raises(RuntimeError, match="in use or claimed"):
            PortClaim()
    claim = PortClaim()
    with pytest.raises(RuntimeError, match="in use or claimed"):
        PortClaim()
    claim.release()
    PortClaim()


def test_another_process_claims_another_port_and_leaves_it_when_it_is_killed(monkeypatch):
    free = PortClaim()
    pair = range(free.port, free.port + 2)
    free.release()
    _only(monkeypatch, pair)
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM_FROM, str(pair[0]), str(pair[-1] + 1)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        theirs = int(child.stdout.readline())
        ours = PortClaim()
        assert {theirs, ours.port} == set(pair)
        with pytest.raises(RuntimeError, match="in use or claimed"):
            PortClaim()
        child.kill()
    assert PortClaim().port == theirs
