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
port_claim.PORTS = [int(port) for port in sys.argv[1:]]
claim = port_claim.PortClaim()
print(claim.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def only(monkeypatch):
    """only(n): n ports that are free; no others are claimed from then on."""

    def choose(count: int) -> list[int]:
        claims = [PortClaim() for _ in range(count)]
        monkeypatch.setattr(port_claim, "PORTS", [claim.port for claim in claims])
        for claim in claims:
            claim.release()
        return port_claim.PORTS

    return choose


def test_no_port_is_claimed_twice_until_it_is_released(only):
    ports = only(20)
    claims = [PortClaim() for _ in ports]
    assert sorted(claim.port for claim in claims) == sorted(ports)
    with pytest.raises(RuntimeError, match="in use or claimed"):
        PortClaim()
    claims[7].release()
    assert PortClaim().port == claims[7].port


def test_a_port_in_use_is_not_claimed(only):
    (port,) = only(1)
    with socket.socket() as other:
        other.bind((HOST, port))
        with pytest.raises(RuntimeError, match="in use or claimed"):
            PortClaim()
    assert PortClaim().port == port


def test_another_process_claims_another_port_and_leaves_it_when_it_is_killed(only):
    pair = only(2)
    command = [sys.executable, "-c", CLAIM_FROM, *map(str, pair)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        theirs = int(child.stdout.readline())
        ours = PortClaim()
        assert {theirs, ours.port} == set(pair)
        with pytest.raises(RuntimeError, match="in use or claimed"):
            PortClaim()
        child.kill()
    assert PortClaim().port == theirs
