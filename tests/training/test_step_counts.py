"""How many kernels a step is, in those of timm's bare ViT of as many blocks; tests/support/kernels.py prints them."""

import pytest
from kernels import step_counted, timms_step


@pytest.mark.parametrize(
    ("name", "passes", "most"),
    [
        ("supervised", 1, 1.15),
        ("mpp", 1, 1.15),
        # Its teacher is a third forward pass, and autograd adds the gradients of both crop sizes one by one.
        ("dino", 2, 1.6),
    ],
)
def test_a_step_is_few_kernels(name, passes, most):
    """passes: of the student, one for each size of crops."""
    bare, ours = timms_step(), step_counted(name).kernels
    print(f"{name}: {ours} kernels, {ours / (passes * bare):.3f} of timm's {passes} x {bare}")
    assert ours <= most * passes * bare
