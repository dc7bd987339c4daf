"""The ways to run the tuned PyTorch peer on a GPU: eagerly, or by torch.compile. The fastest is kept."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import nn

_WARM_UP, _TIMED = 2, 2  # passes over the batches


@dataclasses.dataclass(frozen=True)
class Form:
    """compiled: '' (nothing), 'resnet' or 'model'. mode: torch.compile's; 'reduce-overhead' uses CUDA graphs."""

    name: str
    compiled: str = ""
    mode: str | None = None

    def __call__(self, model: nn.Module) -> Callable:
        """Return the model in this form."""
        if self.compiled == "model":
            return torch.compile(model, mode=self.mode)
        if self.compiled == "resnet" and hasattr(model, "cxr_model"):
            model.cxr_model.vision_backbone.compile(dynamic=False)
        return model

    def images(self, prepare: Callable) -> Callable:
        """Return the function that prepares X-rays in this form, without CUDA graphs: they would reuse its output."""
        return torch.compile(prepare) if self.compiled == "model" else prepare

    def begin_step(self) -> None:
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()


EAGER = Form("eager")
FORMS = (
    EAGER,
    Form("compiled ResNet", "resnet"),
    Form("compiled model", "model"),
    Form("compiled model, CUDA graphs", "model", "reduce-overhead"),
)


def fastest(make: Callable[[Form], Callable[[], None]], say: Callable = lambda text: None) -> tuple[Callable, dict]:
    """Return the fastest of the forms' functions, and its name with every form's seconds, or why it failed."""
    runs, seconds, failed = {}, {}, {}
    for form in FORMS:
        say(f"torch_tuned: {form.name}")
        torch.compiler.reset()
        try:
            run = make(form)
            for _ in range(_WARM_UP):
                run()
            start = time.perf_counter()
            for _ in range(_TIMED):
                run()
            seconds[form.name] = round((time.perf_counter() - start) / _TIMED, 6)
            runs[form.name] = run
        except Exception as error:  # of the compiler, Triton or the driver: the other forms are tried
            failed[form.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not runs:
        raise RuntimeError(f"torch_tuned runs in no form: {failed}")
    best = min(seconds, key=seconds.__getitem__)
    runs[best]()  # compile it again: the later forms have reset the compiler
    return runs[best], {"torch_form": best, "torch_forms_s": seconds, "torch_forms_failed": failed}
