"""One checkpoint, one digest, wherever it lies and however it is cut into files; another one, another digest."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgl_hq.gate.model_digest import ModelDigestError, model_digest


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_config(folder, **changed):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


def edit_weights(folder, name, change):
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors")


def test_a_copy_has_the_same_digest(tiny_model, checkpoint):
    digest = model_digest(str(checkpoint))
    assert digest == model_digest(str(tiny_model)) and len(digest) == 16
    edit_config(checkpoint, transformers_version="9", dtype="float32", use_cache=False, eos_token_id=7, _name_or_path="x")
    (checkpoint / "README.md").write_text("text")
    assert model_digest(str(checkpoint)) == digest


def test_shards_do_not_matter_and_strangers_beside_an_index_neither(checkpoint):
    digest = model_digest(str(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    halves = {"b-1.safetensors": sorted(weights)[:5], "a-2.safetensors": sorted(weights)[5:]}
    for file, names in halves.items():
        save_file({name: weights[name] for name in names}, checkpoint / file)
    assert model_digest(str(checkpoint)) == digest
    index = {"weight_map": {name: file for file, names in halves.items() for name in names}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"extra": torch.ones(3)}, checkpoint / "consolidated.safetensors")
    assert model_digest(str(checkpoint)) == digest


NAME = "model.layers.1.mlp.down_proj.weight"
OTHER_WEIGHTS = {
    "first value": lambda w: torch.cat([w[:1] + 1, w[1:]]),
    "last value": lambda w: torch.cat([w[:-1], w[-1:] + 1]),
    "dtype": lambda w: w.float(),
    "shape": lambda w: w.T.contiguous(),
}


@pytest.mark.parametrize("change", OTHER_WEIGHTS.values(), ids=OTHER_WEIGHTS)
def test_other_weights_have_another_digest(checkpoint, change):
    digest = model_digest(str(checkpoint))
    edit_weights(checkpoint, NAME, change)
    assert model_digest(str(checkpoint)) != digest


def test_another_configuration_has_another_digest(checkpoint):
    digest = model_digest(str(checkpoint))
    edit_config(checkpoint, rms_norm_eps=1e-3)
    assert model_digest(str(checkpoint)) != digest


def test_what_cannot_be_identified(checkpoint, tmp_path):
    with pytest.raises(ModelDigestError, match="neither a folder nor in the local hub cache"):
        model_digest("nobody/nothing")
    with pytest.raises(ModelDigestError, match="neither a folder"):
        model_digest(str(tmp_path / "none"))
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelDigestError, match="ends early"):
        model_digest(str(checkpoint))
    weights.unlink()
    with pytest.raises(ModelDigestError, match="save_pretrained"):
        model_digest(str(checkpoint))
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ModelDigestError, match="cannot read the checkpoint"):
        model_digest(str(checkpoint))


def test_a_hub_name_means_its_local_snapshot(checkpoint, tmp_path, monkeypatch):
    digest = model_digest(str(checkpoint))
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    shutil.copytree(checkpoint, repository / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert model_digest("some/model") == digest
    with pytest.raises(ModelDigestError):
        model_digest("some/model", revision="v2")
