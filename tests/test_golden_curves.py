"""Small runs give the losses that they always gave: to the bit on the machine that recorded them, near them elsewhere.

``golden_curves.py`` made the curves and makes them anew. A change that is not meant to alter what is computed must
leave them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_curves import CURVES, METHODS, TASKS, curve, make_inputs, same_machine

from capotune.kernels import described, native, reference

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN: dict[str, Any] = json.loads(CURVES.read_text(encoding="utf-8"))
NEAR = 1e-6
"""Of a loss, what another processor or level may differ by: they add in another order."""
ACROSS = (("feature-extraction", "text"), ("lora", "labels"), ("qlora", "text"), ("prompt-tuning", "tags"))
"""Each method once, for the level of the tests: the kernels are the same for every task."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return make_inputs(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def pytorch_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with ``CAPOTUNE_NATIVE=0`` from the start."""
    monkeypatch.setenv("CAPOTUNE_NATIVE", "0")
    native.library.cache_clear()
    assert described(torch.device("cpu")) == reference.NAME
    yield
    native.library.cache_clear()


def assert_golden(name: str, found: list[float], tolerance: float) -> None:
    expected = GOLDEN["curves"][name]
    apart = [abs(one - other) / max(1.0, abs(other)) for one, other in zip(found, expected, strict=True)]
    first = next((step for step, difference in enumerate(apart, start=1) if difference > tolerance), None)
    assert first is None, (
        f"the losses of {name} are others than they were from value {first} on, by {max(apart):.2g} at most. "
        f"Recorded on {GOLDEN['made_on']}; this is {same_machine()}. "
        "A change that is meant to alter what is computed says so and renews the curves: "
        "CAPOTUNE_NATIVE=0 python tests/golden_curves.py"
    )


@pytest.mark.usefixtures("pytorch_alone")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_recorded_to_the_bit_on_the_same_machine(
    method: str, task: str, inputs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    tolerance = 0.0 if same_machine() == GOLDEN["made_on"] else NEAR
    assert_golden(f"{method} {task}", curve(method, inputs[task], tmp_path / "run"), tolerance)


@pytest.mark.usefixtures("all_bits")
@pytest.mark.parametrize(("method", "task"), ACROSS)
def test_losses_of_this_level(method: str, task: str, inputs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Reduced precision (AMX) apart, whose products are tested by themselves."""
    assert_golden(f"{method} {task}", curve(method, inputs[task], tmp_path / "run"), NEAR)
