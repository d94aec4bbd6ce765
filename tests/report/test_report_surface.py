import subprocess
import sys

from esper_fn import report


def test_public_names() -> None:
    assert report.__all__ == [
        "Run",
        "RunFolder",
        "create",
        "figures",
        "measure_segment",
        "read",
        "render",
        "write_report",
    ]
    assert report.figures.__all__ == [
        "accuracy_curves",
        "alpha_curves",
        "baseline_bars",
        "loss_curves",
        "parameters_over_time",
        "stage_map",
        "where_it_grew",
    ]
    for module in (report, report.figures):
        assert all(hasattr(module, name) for name in module.__all__)


def test_importing_the_package_loads_neither_jax_nor_matplotlib() -> None:
    code = (
        "import sys, esper_fn.report;"
        "print(sorted({'jax', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
