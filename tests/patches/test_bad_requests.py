"""What would end SGLang's scheduler is refused before it gets there; what it can serve is not."""

from types import SimpleNamespace

import pytest

from sgl_hq.patches.bad_requests import check


@pytest.fixture(autouse=True)
def served_by_us(monkeypatch):
    monkeypatch.setenv("SGLANG_HQ_FORMAT", "bf16")


def test_vanilla_is_left_as_it_is(monkeypatch):
    monkeypatch.delenv("SGLANG_HQ_FORMAT")
    check(MANAGER, _request(), [])


MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))


def _request(**sampling):
    return SimpleNamespace(sampling_params=sampling)


@pytest.mark.parametrize(
    "ids, sampling, said",
    [([], {}, "no tokens"), ([1, 100], {}, "100 is no token id: they are whole numbers from 0 to 99"), ([-1], {}, "-1 is no token id"),
     ([1.5], {}, "1.5 is no token id"), ([[5]], {}, "is no token id"), ([1], {"max_new_tokens": 1.5}, "max_new_tokens is 1.5")],
    ids=str,
)  # fmt: skip
def test_refused(ids, sampling, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        check(MANAGER, _request(**sampling), ids)


@pytest.mark.parametrize("ids", [[0, 99], None])
@pytest.mark.parametrize("sampling", [{}, {"max_new_tokens": None}, {"max_new_tokens": 0}, {"max_new_tokens": 2**64}])
def test_let_through(ids, sampling):
    check(MANAGER, _request(**sampling), ids)


def test_parallel_samples_have_a_list_of_parameters():
    check(MANAGER, SimpleNamespace(sampling_params=[{"max_new_tokens": 1}]), [1])
