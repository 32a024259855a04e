"""The maps are orthonormal, always the same, and what their papers define, each recomputed in another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgl_hq.baselines import rotations
from sgl_hq.baselines.codebook import NormScaled, lloyd_max_levels
from sgl_hq.baselines.rotations import (
    Rotated,
    planar_blocks,
    quaternion_blocks,
    random_rotation,
    rotor_blocks,
    signed_hadamard,
)

MAPS = [signed_hadamard, random_rotation, rotor_blocks, quaternion_blocks, planar_blocks]
# Cl(3,0) as 2x2 matrices: e_i is the i-th Pauli matrix, the geometric product is the matrix product.
E1, E2, E3 = (np.array(m, dtype=complex) for m in ([[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]))


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("dim", [64, 128])
def test_orthonormal(make, dim, tolerances):
    m = make(dim)
    rows = m.shape[0]
    assert m.shape[1] == dim and rows == (-(-dim // 3) * 3 if make is rotor_blocks else dim)
    # entries come from float32 formulas: a few u each, so a product of columns is off by a few (rows + 1) u
    assert (m.T @ m - torch.eye(dim)).abs().max() <= 8 * tolerances.rounded_sum(rows)


@pytest.mark.parametrize("make", MAPS)
def test_a_new_process_gets_the_same_map(make):
    first = make(64).clone()
    make.cache_clear()
    torch.manual_seed(12345)
    assert torch.equal(make(64), first)


@pytest.mark.parametrize("make, block", [(rotor_blocks, 3), (quaternion_blocks, 4), (planar_blocks, 2)])
def test_blocks_do_not_mix(make, block):
    m = make(64)
    row, column = torch.meshgrid(*(torch.arange(n) // block for n in m.shape), indexing="ij")
    assert (m[row != column] == 0).all()
    assert torch.equal(torch.linalg.det(m[:block, :block]).round(), torch.tensor(1.0))  # turns, no mirror
    assert not torch.allclose(m[:block, :block], m[block : 2 * block, block : 2 * block])


def test_the_random_rotation_mixes_everything():
    assert (random_rotation(64) != 0).all() and random_rotation(64).abs().max() < 0.7


def test_rotor_sandwich_in_the_clifford_algebra(tolerances):
    """R v R~ by products of the algebra."""
    s, b12, b13, b23 = rotor = rotations._unit(rotations._normal(22, 4))[5].double().numpy()
    r = s * np.eye(2) + b12 * E1 @ E2 + b13 * E1 @ E3 + b23 * E2 @ E3
    reverse = s * np.eye(2) - b12 * E1 @ E2 - b13 * E1 @ E3 - b23 * E2 @ E3
    matrix = rotations._rotor_matrix(*rotor.tolist()).double().numpy()
    for column, e in enumerate((E1, E2, E3)):
        turned = r @ e @ reverse
        coordinates = [np.trace(turned @ axis).real / 2 for axis in (E1, E2, E3)]
        np.testing.assert_allclose(matrix[:, column], coordinates, atol=16 * tolerances.U)
        assert abs(np.trace(turned)) < 1e-12  # no scalar, and no trivector (its trace is imaginary)
    np.testing.assert_array_equal(rotor_blocks(64)[15:18, 15:18].numpy(), matrix.astype(np.float32))


def test_quaternion_sandwich_by_hamiltons_rules(tolerances):
    """q_left v conj(q_right) with quaternions as 2x2 matrices: w + x i + y j + z k, i = -i sigma_1, ..."""

    def matrix(q):
        w, x, y, z = q
        return w * np.eye(2) - 1j * (x * E1 + y * E2 + z * E3)

    left, right = rotations._unit(rotations._normal(2, 16, 4))[:, 3].double().numpy()
    v = np.array([0.3, -1.2, 2.0, 0.7])
    product = matrix(left) @ matrix(v) @ matrix(right).conj().T  # the adjoint is the conjugate
    wanted = [np.trace(product).real / 2, *(np.trace(1j * axis @ product).real / 2 for axis in (E1, E2, E3))]
    got = quaternion_blocks(64)[12:16, 12:16].double().numpy() @ v
    np.testing.assert_allclose(got, wanted, atol=32 * tolerances.U * np.abs(v).sum())


def test_planar_blocks_are_turns():
    block = planar_blocks(64)[2:4, 2:4]
    assert block[0, 0] == block[1, 1] and block[0, 1] == -block[1, 0] != 0


def test_signed_hadamard_by_the_published_code(tolerances):
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    signs = np.where((np.arange(64) * 1103515245 + 12345) & 1, -1.0, 1.0)
    y, width = x * signs, 1
    while width < 64:
        y = y.reshape(-1, 2, width)
        y = np.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], 1).reshape(-1)
        width *= 2
    got = (torch.from_numpy(x) @ signed_hadamard(64).T).numpy()
    np.testing.assert_allclose(got, y / 8, atol=2 * tolerances.rounded_sum(64) * np.abs(x).sum() / 8)


@pytest.mark.parametrize("make", [random_rotation, rotor_blocks, quaternion_blocks, planar_blocks])
def test_the_error_of_rotated_vectors_is_that_of_the_codebook(prefix, tolerances, make):
    side, m = Rotated(NormScaled(3), make), make(64)
    error = (side.decode(side.encode(prefix), tuple(prefix.shape)) - prefix).norm(dim=-1)
    rotated = prefix @ m.T
    levels = torch.tensor(lloyd_max_levels(3)) / m.shape[0] ** 0.5
    rounding = 4 * tolerances.rounded_sum(m.shape[0]) * m.shape[0] ** 0.5 * prefix.norm(dim=-1)
    assert (error <= tolerances.norm_scaled_error(rotated, levels).norm(dim=-1) + rounding).all()
