"""The tuned peer keeps the fastest form, and says why another one failed."""

import time

import pytest

torch = pytest.importorskip("torch", reason="the peers need torch: pip install '.[torch]'")
torch_forms = pytest.importorskip("medfuse_jax.bench.torch_forms")


def test_fastest_form_is_kept_and_a_failure_is_recorded():
    seconds = {"eager": 0.05, "compiled ResNet": 0.001, "compiled model, CUDA graphs": 0.05}

    def make(form):
        if form.name == "compiled model":
            raise RuntimeError("no Triton\nand more words")
        return lambda: time.sleep(seconds[form.name]) or form.name

    run, facts = torch_forms.fastest(make)
    assert run() == facts["torch_form"] == "compiled ResNet"
    assert facts["torch_forms_s"].keys() == seconds.keys() and facts["torch_forms_s"]["eager"] >= 0.05
    assert facts["torch_forms_failed"] == {"compiled model": "RuntimeError: no Triton and more words"}


def test_all_forms_failing_is_an_error():
    with pytest.raises(RuntimeError, match=r"in no form.*eager.*no GPU"):
        torch_forms.fastest(lambda form: (_ for _ in ()).throw(ValueError("no GPU")))


@pytest.mark.parametrize("form", torch_forms.FORMS, ids=lambda form: form.name)
def test_only_the_forms_that_say_so_compile(form, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: compiled.append((f, mode)) or f)
    model = torch.nn.Linear(1, 1)
    prepare = print
    assert form(model) is model and form.images(prepare) is prepare
    expected = [(model, form.mode), (prepare, None)] if form.compiled == "model" else []
    assert compiled == expected
